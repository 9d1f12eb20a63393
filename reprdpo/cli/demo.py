"""`reprdpo demo`: the whole method on the embedded sandbox world, on a laptop, with no download."""

from importlib.resources import as_file, files

from reprdpo.cli.parser import Parser


def main(argv: list[str]) -> None:
    parser = Parser(prog="reprdpo demo", description=__doc__)
    parser.add_argument("--output_dir", default="runs/demo", help="the run's folder (default: %(default)s)")
    parser.add_argument("--scale", choices=("demo", "tiny"), default="demo", help="tiny: seconds, to see that it works")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    arguments = parser.parse_args(argv)

    from reprdpo.cli.run import execute
    from reprdpo.experiments.config import load_config

    with as_file(files("reprdpo.experiments") / f"{arguments.scale}.yaml") as path:
        execute(load_config(path, output_dir=arguments.output_dir), as_json=arguments.json)
