"""HTML pages from the packages' templates."""

import jinja2


def template(package: str, name: str) -> jinja2.Template:
    """Returns a template of a package's folder templates/.

    What it is filled with is escaped, and a name that it does not get is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)
