"""What a cluster's nodes lack, on a real Ray of one node. Two nodes: tests/recipe/test_recipe_run.py."""

import pytest

from search_backends import nodes


@pytest.fixture
def cluster(monkeypatch):
    import ray

    found = ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    monkeypatch.setenv("RAY_ADDRESS", found.address_info["address"])
    yield found.address_info["node_ip_address"]
    ray.shutdown()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(nodes, "_LOOK_S", 0.01)


@pytest.mark.long
def test_a_cluster_that_lacks_something(cluster, capsys, tmp_path, monkeypatch):
    assert nodes.main(["wait", "1"]) == nodes.main(["check", "1", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""
    assert nodes.main(["check", "1", str(tmp_path), "/no/such folder"]) == 1
    assert capsys.readouterr().err == f"node {cluster}: there is no /no/such folder\n"
    for command in ("wait", "check", "watch"):
        assert nodes.main([command, "2", "--limit", "1"]) == 1
        assert capsys.readouterr().err == f"1 of 2 nodes are there: {cluster}\n"
    there = nodes.platform.python_version()
    monkeypatch.setattr(nodes.platform, "python_version", lambda: "2.7")
    assert nodes.main(["check", "1"]) == 1
    assert capsys.readouterr().err == f"node {cluster}: Python is {there}, 2.7 on the node that starts the run\n"


@pytest.mark.parametrize("address", ["127.0.0.1:9", "auto", "", "nowhere:6379"])
def test_nobody_listens(monkeypatch, capsys, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert nodes.main(["watch", "2"]) == 1
    assert f"nothing listens at {address}: the first node is down" in capsys.readouterr().err
