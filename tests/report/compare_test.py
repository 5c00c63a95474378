"""fame_jax compare: exit codes, the page's place, and one line for each mistake."""

import re

import pytest
from fixtures import run_python
from report_fixtures import make_compared_run

from fame_jax.errors import UserError
from fame_jax.main import main
from fame_jax.report import compare


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / 'runs'
    return [str(make_compared_run(folder / name, n)) for n, name in enumerate('ab')]


def test_the_page_is_written_and_the_table_printed(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for out, path in (
        ('', tmp_path / 'compare.html'),
        ('', tmp_path / 'compare.html'),  # its own page is replaced
        ('pages/new/mine.html', tmp_path / 'pages' / 'new' / 'mine.html'),
    ):
        assert main(['compare', *runs, f'--out={out}', '--against=b']) == 0
        assert '<h1><bdi>2 runs on toys</bdi></h1>' in path.read_text(encoding='utf-8')
        shown = capsys.readouterr().out
        assert 'NDCG@10 minus b' in shown and str(path.relative_to(tmp_path)) in shown


def test_out_is_a_folder_or_a_file(tmp_path):
    assert compare._output_path(f'{tmp_path}/a') == tmp_path / 'a' / 'compare.html'
    assert compare._output_path(f'{tmp_path}/a/b.html') == tmp_path / 'a' / 'b.html'
    (tmp_path / 'file').touch()
    for path in ('file/pages', 'file/page.html'):
        with pytest.raises(UserError, match='choose another --out'):
            compare._output_path(f'{tmp_path}/{path}')


def test_another_file_is_not_replaced(runs, tmp_path, capsys):
    path = tmp_path / 'compare.html'
    path.write_text('<html>mine</html>')
    assert main(['compare', *runs, f'--out={tmp_path}']) == 2
    assert path.read_text() == '<html>mine</html>'
    captured = capsys.readouterr()
    assert captured.out == '' and captured.err.count('\n') == 1
    assert 'is no page of this command; choose another --out' in captured.err


@pytest.mark.parametrize(
    'argv, words',
    [
        ([], 'compare: the following arguments are required: RUN'),
        (['--nothing', '{}'], 'compare: unrecognized arguments: --nothing'),
        (['no_such_run'], 'no_such_run is no folder of a run'),
        (['{}', '--against=c'], '--against=c is none of the runs'),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert main(['compare', *(argument.format(runs[0]) for argument in argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and re.search(words, line)
    assert not (tmp_path / 'compare.html').exists()


def test_comparing_needs_no_jax(runs, tmp_path):
    code = f"""
        import sys
        from fame_jax.main import main
        assert main(['compare', *{runs!r}, '--out={tmp_path}/new']) == 0
        assert not {{'jax', 'flax', 'absl.logging', 'orbax'}} & {{*sys.modules}}
        """
    assert 'masked' in run_python(code)
