package envoywatch

import (
	"errors"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// TestAfter: a stream is dated by its changes, and leads where it led.
func TestAfter(t *testing.T) {
	start := time.Unix(1_800_000_000, 0)
	at := func(minutes int) time.Time { return start.Add(time.Duration(minutes) * time.Minute) }
	started := &envoyadmin.Bootstrap{Targets: []envoyadmin.Target{{Address: "td:443"}}}
	closed := &symptom.Stream{Target: "other:443", Code: 14}
	var was View
	for i, step := range []struct {
		name   string
		view   View
		seen   time.Time
		target string
	}{
		{"not known", View{}, time.Time{}, ""},
		{"connected", View{Stands: true, Aside: Aside{Started: started}}, at(1), "td:443"},
		{"still", View{Stands: true}, at(1), "td:443"},
		{"closed", View{Stream: closed, Past: Past{Closed: closed}}, at(3), "other:443"},
		{"Envoy is away", View{Outage: Outage{Err: errors.New("refused")}}, time.Time{}, "other:443"},
		{"and back without one", View{Apart: true, Aside: Aside{Started: started},
			Past: Past{Closed: closed}}, at(5), "td:443"},
		{"for long", View{Apart: true}, at(5), "td:443"},
	} {
		was = step.view.After(was, at(i))
		if !was.Seen.Equal(step.seen) || was.Target != step.target {
			t.Errorf("%s: since %v, to %q; want %v, %q", step.name, was.Seen, was.Target, step.seen,
				step.target)
		}
	}
}
