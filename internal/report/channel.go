package report

import (
	"math"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
)

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
	// Waiting is what was told and is not written yet.
	Waiting int
	// Left is how much may be written at once, of Most, of which PerMinute come back in a minute
	// (0: as the other side takes it). Next is when one more may be written; zero: now.
	Left, Most, PerMinute float64
	Next                  time.Time
}

// Channels are the channels as the status tells of them, each whether it is on or off.
func (s Sources) Channels() []status.Channel {
	var guest, serial, cloud ChannelState
	if s.GuestAttributes != nil {
		guest = guestChannel(s.GuestAttributes())
	}
	if s.Serial != nil {
		serial = serialChannel(s.Serial())
	}
	if s.CloudLogging != nil {
		cloud = s.CloudLogging()
	}
	return []status.Channel{guest.channel("guest_attributes", "queries"),
		serial.channel("serial", "lines"), cloud.channel("cloud_logging", "entries")}
}

func (c ChannelState) channel(name, unit string) status.Channel {
	told := status.Channel{Name: name, Enabled: c.Enabled, Up: c.Enabled && c.Up, Error: c.LastError,
		Last: c.LastSuccess.UTC(), Waiting: c.Waiting, Written: c.Writes, Failures: c.Failures,
		Dropped: c.Dropped}
	if c.Enabled {
		told.Budget = status.Budget{Unit: unit, Left: math.Round(c.Left*100) / 100, Most: c.Most,
			PerMinute: c.PerMinute, Next: c.Next.UTC()}
	}
	return told
}

// guestChannel is what all channels have in common of the guest attributes.
func guestChannel(s guestattr.State) ChannelState {
	return ChannelState{
		Enabled: s.Enabled, Up: s.Enabled && s.LastError == "" && !s.Since.IsZero(),
		Writes: s.Writes, Failures: s.Failures, LastError: s.LastError, LastSuccess: s.LastSuccess,
		Waiting: s.Pending, Left: s.Left, Most: s.Most, PerMinute: s.PerMinute, Next: s.Next,
	}
}

// serialChannel is the same of the serial port.
func serialChannel(s SerialState) ChannelState {
	c := ChannelState{
		Enabled: s.Path != "", Up: s.Open && !s.Blocked,
		Writes: s.Lines, Failures: s.Failures, Dropped: s.Dropped,
		LastError: s.LastError, LastSuccess: s.LastSuccess,
		Waiting: s.Waiting, Left: float64(maxQueue - s.Waiting), Most: maxQueue,
	}
	switch {
	case !c.Enabled:
		c.LastError = "no --serial-port"
	case s.Blocked:
		c.LastError = "nobody takes what is written"
	}
	return c
}
