package reconcile

import (
	"slices"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// TestRepairTimes: a repair is timed from what first showed the drift to its end, whatever was in
// the way, and nothing else is taken for one.
func TestRepairTimes(t *testing.T) {
	const read = 70 * time.Millisecond
	undo := func(r *rig) { r.others(byIptables, "-D OUTPUT "+jump) }
	for _, test := range []struct {
		name string
		run  func(r *rig) (passes []Outcome)
		want []time.Duration
	}{
		{"a notification", func(r *rig) []Outcome {
			undo(r)
			return []Outcome{r.pass(time.Second), r.pass(time.Second)}
		}, []time.Duration{time.Second + read}},
		{"one that came in before the loop had time", func(r *rig) []Outcome {
			event := byIptables
			event.At = r.now.Add(-300 * time.Millisecond)
			r.others(event, "-D OUTPUT "+jump)
			return []Outcome{r.pass(0), r.pass(time.Second)}
		}, []time.Duration{300*time.Millisecond + read}},
		{"the first of two", func(r *rig) []Outcome {
			undo(r)
			r.f.Note(byIptables, r.now.Add(200*time.Millisecond))
			return []Outcome{r.pass(time.Second)}
		}, []time.Duration{time.Second + read}},
		{"a poll", func(r *rig) []Outcome {
			r.unwatched = true
			if err := r.nat.Restore("*nat\n-D OUTPUT "+jump+"\nCOMMIT\n", nil); err != nil {
				r.t.Fatal(err)
			}
			return []Outcome{r.pass(unwatchedPoll), r.pass(unwatchedPoll)}
		}, []time.Duration{read}},
		{"a write of others that changes nothing of ours", func(r *rig) []Outcome {
			r.others(byIptables, "-A OUTPUT -p udp -j RETURN")
			passes := []Outcome{r.pass(time.Second), r.pass(time.Hour)}
			undo(r)
			return append(passes, r.pass(time.Second))
		}, []time.Duration{time.Second + read}},
		{"a repair that is locked out at first", func(r *rig) []Outcome {
			undo(r)
			r.applyFails = iptables.ErrLocked
			passes := []Outcome{r.pass(0)}
			r.applyFails = nil
			return append(passes, r.pass(3*time.Second))
		}, []time.Duration{3*time.Second + read}},
		{"somebody else puts it right while it is locked out", func(r *rig) []Outcome {
			undo(r)
			r.applyFails = iptables.ErrLocked
			passes := []Outcome{r.pass(0)}
			r.applyFails = nil
			r.others(byIptables, "-I OUTPUT "+jump)
			passes = append(passes, r.pass(3*time.Second))
			undo(r)
			return append(passes, r.pass(time.Second))
		}, []time.Duration{time.Second + read}},
		{"undone between the write and its reading back", func(r *rig) []Outcome {
			undo(r)
			r.between = func() {
				r.between = nil
				undo(r)
			}
			return []Outcome{r.pass(time.Second), r.pass(time.Second)}
		}, []time.Duration{2*time.Second + read}},
		{"a new want", func(r *rig) []Outcome {
			w := anInterception()
			w.Services = w.Services[:1]
			r.want(w)
			return []Outcome{r.pass(time.Second)}
		}, nil},
	} {
		r := installed(t)
		r.takes = read
		var have []time.Duration
		for _, o := range test.run(r) {
			have = append(have, o.Repairs...)
		}
		if !slices.Equal(have, test.want) {
			t.Errorf("%s: %v, want %v", test.name, have, test.want)
		}
		if !r.has("OUTPUT", jump) {
			t.Errorf("%s: not repaired", test.name)
		}
	}
}

// TestBackOffsCounted: one that begins counts once, and what it holds back is part of the repair's
// time.
func TestBackOffsCounted(t *testing.T) {
	r := installed(t)
	began, longest := 0, time.Duration(0)
	for range 20 {
		r.others(byIptables, "-D OUTPUT "+jump)
		for range 4 {
			out := r.pass(100 * time.Millisecond)
			began += out.BackOffs
			for _, d := range out.Repairs {
				longest = max(longest, d)
			}
			if out.BackOffs > 0 && !out.Facts.Fighting {
				t.Error("a back-off begins that is none")
			}
		}
		if r.has("OUTPUT", jump) {
			continue
		}
		if err := r.nat.Restore("*nat\n-I OUTPUT 1 "+jump+"\nCOMMIT\n", nil); err != nil {
			t.Fatal(err)
		}
	}
	if began != 1 || longest < backOffFirst {
		t.Errorf("%d back-offs, the longest repair %v", began, longest)
	}
	if out := r.pass(time.Minute); out.BackOffs != 0 {
		t.Errorf("its end is no beginning: %+v", out.Work)
	}
}

// TestWork: what writes took, refused ones too, and what was removed from the connection-tracking
// table; none of it twice.
func TestWork(t *testing.T) {
	r := newRig(t)
	r.pass(0)
	r.applyFails = iptables.ErrLocked
	out := r.pass(0)
	if !slices.Equal(out.Took, []time.Duration{5 * time.Second}) || out.Waited != 4*time.Second ||
		out.Removed != (Removed{}) || !out.InSync.IsZero() {
		t.Errorf("locked: %+v", out)
	}
	r.applyFails = nil
	w := anInterception()
	w.DNSPort = 15053
	r.want(w)
	out = r.pass(10 * time.Second)
	if !slices.Equal(out.Took, []time.Duration{20 * time.Millisecond}) ||
		out.Waited != time.Millisecond || out.Removed != (Removed{HalfOpen: 2, DNS: 1}) ||
		!out.InSync.Equal(r.now) {
		t.Errorf("written: %+v", out)
	}
	at := r.now
	if out = r.pass(100 * time.Millisecond); out.Took != nil || out.Waited != 0 ||
		out.Removed != (Removed{}) || !out.InSync.Equal(at) {
		t.Errorf("an idle pass: %+v", out)
	}
	if out = r.pass(time.Second); out.Removed != (Removed{DNS: 1}) {
		t.Errorf("late answers: %+v", out)
	}
}
