package report

import "time"

// ChannelState is how a channel that tells the world of the VM does: guest attributes, serial port
// 1, Cloud Logging. Counts are since the start of this program and only grow.
type ChannelState struct {
	// Enabled is false when the channel is turned off, by a setting or by the platform's refusal.
	Enabled bool
	// Up is whether the newest try was taken: a query, a line, a request. False before the first.
	Up bool
	// Writes is what was written: attributes, lines, entries. One that was said twice counts once.
	Writes uint64
	// Failures is how many tries failed. One that is tried again may succeed then.
	Failures uint64
	// Dropped is what will never be written: it waited for too long, or was refused for good.
	Dropped uint64
	// LastError is why the newest try that failed did; "" after a success, and before the first.
	LastError string
	// LastSuccess is when the newest try was taken; zero before the first.
	LastSuccess time.Time
}
