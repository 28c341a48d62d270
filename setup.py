"""Puts configs/ and models/tiny/ into the wheel, as data of the planner; everything else stands in pyproject.toml.

They lie at the top of the repository because people edit them; `planner.inputs.shipped` finds them in both places.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "models/tiny")


class BuildWithData(build_py):
    """`build_py`, and the shipped folders beside the planner's modules. An editable install reads the checkout."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not self.editable_mode:
            for folder in SHIPPED:
                target = Path(self.build_lib) / "planner" / "shipped" / folder
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(folder, target)


setup(cmdclass={"build_py": BuildWithData})
