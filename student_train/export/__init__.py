"""A student out to where it runs: formats, each written, run in its own runtime and compared with the float student.

Read in this order: `formats` (the table), `environments` and `workers` (where foreign tools run), `agreement` (the
check), `writing` (`student-train export --format`), `bench` and `bench_page` (`student-train bench`). The scripts in
`workers/` run in other environments and import nothing of the project.
"""
