"""The parts of `kernel_gen.sweep`.

arguments   the command line, and the request it describes
plan        request -> workloads, loads and ranked configurations (cells)
candidates  what is run, one by one, and how it went
builds      real build facts: bundle, cache, or compiled now
predict     rows by the analytic model
isolation   rows by measurement, in worker processes that may hang or die
detect      which GPUs are here
cluster     either kind of rows over a Ray cluster
run         rows -> profile on disk -> best of each cell
report      closing tables and crossovers
heatmap     the picture
progress    the bar on stderr
"""
