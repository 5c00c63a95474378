"""benchmarks/update.py: parts by time, and means over seeds."""

from benchmarks import update


def test_parts_follow_one_another_in_time(tmp_path):
    """Twenty ratings from the last to the first: 16, then one in each of four parts."""
    head = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
    lines = [f'{n}\t7\t3\t{1000 - n}\n' for n in range(20)]
    (tmp_path / 'a.inter').write_text(head + ''.join(lines))
    paths = update.write_parts(tmp_path / 'a.inter', tmp_path)
    rows = [path.read_text().splitlines() for path in paths]
    assert [row[0] for row in rows] == ['user,item,rating,timestamp'] * 5
    users = [[int(line.split(',')[0]) for line in row[1:]] for row in rows]
    assert users == [list(range(19, 3, -1)), [3], [2], [1], [0]]


def test_a_row_has_means_deviations_and_the_ratio():
    def step(value, seconds):
        names = ('validation_ndcg@10', 'test_ndcg@10')
        return {name: value for name in names} | {
            'cpu_seconds': seconds,
            'seconds': seconds,
            'epochs': 3,
        }

    seeds = [
        {
            'updates': [
                {'update': step(value, 10), 'scratch': step(value, 80), 'data': {'actions': 5}}
                for _ in range(4)
            ]
        }
        for value in (0.1, 0.3)
    ]
    rows = update.summarise(seeds)
    assert [row['update'] for row in rows] == [1, 2, 3, 4] and rows[0]['actions'] == 5
    assert abs(rows[0]['update_test_ndcg@10'] - 0.2) < 1e-9
    assert abs(rows[0]['scratch_test_ndcg@10_deviation'] - 0.02**0.5) < 1e-9
    assert rows[0]['cpu_ratio'] == 8
    (alone,) = {len(row) for row in update.summarise(seeds[:1])}
    assert alone < len(rows[0])  # no deviation of one seed
