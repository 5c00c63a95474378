"""Table 2 as a page, word for word."""

import json

from runs_test import MACHINE, finish, runs_of

from benchmarks import table_page, verdict


def page(tmp_path, *flags):
    """Through JSON, as who reads table2.json would make it."""
    table = {'command': 'THE COMMAND', 'datasets': verdict.collect(runs_of(tmp_path, *flags))}
    return table_page.markdown(json.loads(json.dumps(table)))


def test_the_table_word_for_word(tmp_path):
    """Two seeds of SASRec, one of FAME; by hand: sd of a and a + .02 is .02 / sqrt(2) = .0141."""
    rank_U = [1, 2, 3, 30]
    finish(tmp_path, 'sasrec', 0, base=0.10, ranks=rank_U, epochs=8)
    finish(tmp_path, 'sasrec', 1, base=0.12, ranks=rank_U, epochs=11, seconds=20)
    finish(tmp_path, 'fame', 0, base=0.2, ranks=rank_U, seconds=1500, parameters=5678)
    assert page(tmp_path, '--models=sasrec,fame', '--seeds=0,1') == WHOLE


WHOLE = """\
# Table 2 under one protocol

    THE COMMAND

Test, leave one out, every user against the whole catalogue, a tie counts against the target; \
the best epoch by validation NDCG@20, masked. Mean and sample standard deviation over so many \
seeds as the row says; one seed has none. Seconds are of training, means over seeds. *Rows in \
italics are what others printed, under the protocol they name.*

## toys: 4 users, 30 items

### Masked

| model | seeds | HR@5 | HR@10 | HR@20 | NDCG@5 | NDCG@10 | NDCG@20 | epochs | seconds \
| parameters |
|---|---|---|---|---|---|---|---|---|---|---|
| popularity |  | .0100 | .0200 | .0300 | .0400 | .0500 | .0600 |  |  |  |
| SASRec (CE) | 2 | .1100 ± .0141 | .1200 ± .0141 | .1300 ± .0141 | .1400 ± .0141 | .1500 ± .0141 \
| .1600 ± .0141 | 8 to 11 | 15 | 1,234 |
| FAME | 1 | .2000 | .2100 | .2200 | .2300 | .2400 | .2500 | 8 \
| 1,500 (1,510 with its backbone) | 5,678 |
| *FAME's Table 2 (arXiv 2411.01457); masking not told* |  | *.0820* | *.1065* | *.1409* \
| *.0603* | *.0681* | *.0759* |  |  |  |

### Unmasked

| model | seeds | HR@5 | HR@10 | HR@20 | NDCG@5 | NDCG@10 | NDCG@20 | epochs | seconds \
| parameters |
|---|---|---|---|---|---|---|---|---|---|---|
| popularity |  | .0000 | .0100 | .0200 | .0300 | .0400 | .0500 |  |  |  |
| SASRec (CE) | 2 | .0600 ± .0141 | .0700 ± .0141 | .0800 ± .0141 | .0900 ± .0141 | .1000 ± .0141 \
| .1100 ± .0141 | 8 to 11 | 15 | 1,234 |
| FAME | 1 | .1500 | .1600 | .1700 | .1800 | .1900 | .2000 | 8 \
| 1,500 (1,510 with its backbone) | 5,678 |
| *FAME's Table 2 (arXiv 2411.01457); masking not told* |  | *.0820* | *.1065* | *.1409* \
| *.0603* | *.0681* | *.0759* |  |  |  |

### FAME against SASRec (CE)

Of the models that are not FAME it is the best by validation NDCG@20, masked. 4 users, each with \
the mean of its NDCG over the seeds 0; users resampled 2,000 times in pairs, seeds not; \
Wilcoxon's signed-rank test, two-sided.

|  | FAME | SASRec (CE) | difference | 95 % interval | p |
|---|---|---|---|---|---|
| masked NDCG@10 | .5327 | .5327 | +.0000 | +.0000 to +.0000 | 1.0000 |
| masked NDCG@20 | .5327 | .5327 | +.0000 | +.0000 to +.0000 | 1.0000 |
| unmasked NDCG@10 | .5327 | .5327 | +.0000 | +.0000 to +.0000 | 1.0000 |
| unmasked NDCG@20 | .5327 | .5327 | +.0000 | +.0000 to +.0000 | 1.0000 |

Machine: 1 x cpu, 2 cores, Linux; fame_jax 9.9, python 3.11.0, jax 0.10.2; 2026-11-21.

Not done: fame_seed1.
"""


def test_machines_are_told_apart_and_so_are_runs_beside_each_other(tmp_path):
    other = MACHINE | {'cores': 16, 'date': '2026-11-23'}
    finish(tmp_path, 'core', 0)
    finish(tmp_path, 'core', 1, machine=MACHINE | {'date': '2026-11-22'})
    finish(tmp_path, 'duorec', 0, machine=other)
    told = '{"command": "c", "jobs": 4, "load": 2.5}'
    (tmp_path / 'toys' / 'core_seed1' / 'command.json').write_text(told)
    text = page(tmp_path, '--models=core,duorec', '--seeds=0,1')
    assert 'Machine of CORE: 1 x cpu, 2 cores, ' in text
    assert '; 2026-11-21 to 2026-11-22.\n' in text
    assert 'Machine of DuoRec: 1 x cpu, 16 cores, ' in text and '; 2026-11-23.\n' in text
    assert 'up to 4 of these runs at a time, and a load of up to 2.5 when one began' in text


def test_remarks_are_numbered_and_stand_below(tmp_path):
    finish(tmp_path, 'atten_mixer', 0)
    text = page(tmp_path, '--models=atten_mixer', '--seeds=0')
    assert text.count("*FAME's Table 2 (arXiv 2411.01457); masking not told* [1] [2] |") == 2
    assert '\n[1] the paper prints NDCG .403 .481 .574, ten times what is meant.\n' in text
    assert '\n[2] impossible: NDCG@20 - NDCG@10 is .0093, its HR allow .0064 to .0078.\n' in text
