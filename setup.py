"""Refuses a wheel: the checkout itself is installed, in place. The rest is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_py import build_py


class InPlace(build_py):
    """Refuses to build a wheel. A wheel would hold the modules without what they read and start
    next to them: cards, plan, records, and the history that a record's commit is checked against.
    """

    def run(self) -> None:
        if not self.editable_mode:
            raise SystemExit(
                "error: this project runs from its checkout and has no wheel: make demo, or pip "
                "install -r requirements.txt, installs it in place (as pip install -e . does)"
            )
        super().run()


setup(cmdclass={"build_py": InPlace})
