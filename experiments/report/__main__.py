"""Write a run as one HTML page that needs no network: accuracy, curves, confusion, blocks, options.

The page says with which command and which versions the run can be repeated. It is one file, to
send to others; its pictures are in it.
"""

from experiments import startup
from experiments.command_line import parse, run
from experiments.report.config import ReportConfig


def _report(config: ReportConfig) -> int:
    # Imported late: JAX takes longer to start than `--help` may take to answer.
    from experiments.report.command import report

    return report(config)


if __name__ == "__main__":
    config = parse(ReportConfig, "report", __doc__ or "")
    startup.prepare()
    run(lambda: _report(config))
