"""Programs for people and CI that are no part of the package."""
