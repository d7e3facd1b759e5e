"""The page that several files look at: about a run with all there can be."""

import pytest
from report_folders import ANALYSIS, ATTACKS, RESULTS, ROWS, make_run

from s2ap_ext.report import read_all, to_html


@pytest.fixture(scope="session")
def page_text(tmp_path_factory):
    rows, codes = [ROWS[0], ROWS[1], ROWS[2] | ATTACKS], dict.fromkeys(name for name in ATTACKS if name != "worst")
    folder = tmp_path_factory.mktemp("page") / "a-run-with-quite-a-long-name-that-has-no-spaces"
    return to_html(*read_all([make_run(folder, RESULTS | {"rows": rows, "attacks": codes}, analysis=ANALYSIS)]))
