// Package clock makes times as they are read around a step of the wall clock: by the monotonic
// clock they are as far apart as before.
package clock

import (
	"time"
	"unsafe"
)

// Set is t, of time.Now, as it would have been read had the wall clock been set by so many whole
// seconds before. It panics where t has no monotonic reading, or the time is out of the years 1885
// to 2157 that one can have.
func Set(t time.Time, by time.Duration) time.Time {
	// The first field of time.Time, by its source: one bit that says that there is a monotonic
	// reading, 33 bits of seconds since 1885, 30 bits of nanoseconds.
	const has, nanoseconds = 1 << 63, 30
	wall := (*uint64)(unsafe.Pointer(&t)) //nolint:gosec // no other way leads there
	if *wall&has == 0 || by%time.Second != 0 {
		panic("clock.Set: no monotonic reading, or no whole seconds")
	}
	*wall += uint64(by/time.Second) << nanoseconds //nolint:gosec // two's complement goes back, too
	if *wall&has == 0 {
		panic("clock.Set: out of range")
	}
	return t
}
