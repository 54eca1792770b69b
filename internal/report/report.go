// Package report carries what the agent knows to those who only listen: the serial port and
// Prometheus.
//
// The rule of the package: nothing here can hold up a pass. [Serial] queues lines for a port that
// may block for ever, and drops the oldest; [Metrics] takes the status after a pass and what
// happened in it, a [Pass], and is read by scrapes at their own time.
//
// Guest attributes have a rate budget and a package of their own, guestattr. What is worth saying
// is decided by package agent, in words that package symptom found.
package report
