package clock

import (
	"testing"
	"time"
)

func TestSet(t *testing.T) {
	before := time.Now()
	for _, by := range []time.Duration{6 * time.Hour, -6 * time.Hour, 0} {
		after := Set(before.Add(time.Minute), by)
		if have := after.Sub(before); have != time.Minute {
			t.Errorf("%v: %v by the monotonic clock", by, have)
		}
		if have := after.Round(0).Sub(before.Round(0)); have != by+time.Minute {
			t.Errorf("%v: %v by the wall clock", by, have)
		}
	}
}
