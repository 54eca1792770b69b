package envoyadmin

import (
	"fmt"
	"testing"
	"time"
)

// TestCharges: a question is charged what the quickest of its kind took, a dump by its bytes, and
// never more than it can cost.
func TestCharges(t *testing.T) {
	const ms, mb = time.Millisecond, 1_000_000
	type answer struct {
		q     Question
		took  time.Duration
		bytes int64
		err   error
		want  time.Duration
	}
	for name, answers := range map[string][]answer{
		"the first dump behind Envoy's own work": {
			{DumpQuestion, 16 * time.Second, 5 * mb, nil, 1300 * ms},
			{DumpQuestion, 600 * ms, 5 * mb, nil, 600 * ms},
			{DumpQuestion, 9 * time.Second, 5 * mb, nil, 600 * ms},
			{DumpQuestion, 9 * time.Second, 5 * mb, fmt.Errorf("%w", ErrTimeout), 9 * time.Second},
		},
		"a dump that grows": {
			{DumpQuestion, 5 * ms, 0, nil, 5 * ms},
			{DumpQuestion, 100 * ms, 2 * mb, nil, 55 * ms},
		},
		"short ones": {
			{ReadyQuestion, 800 * ms, 0, nil, 5 * ms},
			{ReadyQuestion, ms, 0, nil, ms},
			{ReadyQuestion, 800 * ms, 0, nil, ms},
			{ServerInfoQuestion, 2 * ms, 0, nil, 2 * ms},
			{ServerInfoQuestion, 5 * time.Second, 0, ErrTimeout, 2 * ms},
			{ReadyQuestion, 5 * time.Second, 0, ErrRefused, 0},
		},
		"looks": {
			{LookQuestion, 5 * time.Second, 0, ErrTimeout, time.Second},
			{LookQuestion, 5 * time.Second, 0, nil, time.Second},
			{LookQuestion, 30 * ms, 0, nil, 30 * ms},
			{LookQuestion, 900 * ms, 0, nil, 30 * ms},
			{namedLook, 900 * ms, 0, nil, 900 * ms},
			{namedLook, 10 * ms, 0, nil, 10 * ms},
			{LookQuestion, 900 * ms, 0, nil, 30 * ms},
		},
		"others": {
			{ClustersQuestion, 16 * time.Second, 0, nil, 2 * time.Second},
			{ClustersQuestion, 500 * ms, 0, nil, 500 * ms},
			{StatsQuestion, 700 * ms, 0, nil, 700 * ms},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var c charges
			for i, a := range answers {
				got := time.Duration(0)
				if a.err == nil {
					got = c.answered(a.q, a.took, a.bytes)
				} else {
					got = c.failed(a.q, a.took, a.err)
				}
				if got.Round(ms) != a.want {
					t.Errorf("answer %d, %v after %v: charged %v, want %v", i, a.q, a.took, got, a.want)
				}
			}
		})
	}
}

// TestChargesForget: what has become dearer for good is charged so after ten answers.
func TestChargesForget(t *testing.T) {
	var c charges
	c.answered(LookQuestion, time.Millisecond, 0)
	for range leastOf {
		c.answered(LookQuestion, time.Second/2, 0)
	}
	if got := c.expected(LookQuestion); got != time.Second/2 {
		t.Errorf("%v", got)
	}
}

// TestDetectorStarved: while Envoy is busy with its own updates, each question waits for its main
// thread. That does not keep a dump away: one of 5 MB each few seconds, as without the waiting.
func TestDetectorStarved(t *testing.T) {
	var d Detector
	now := time.Unix(1e9, 0)
	f := Fingerprint{Process: 1}
	last, longest, dumps := now, time.Duration(0), 0
	for end := now.Add(10 * time.Minute); now.Before(end); {
		d.Hint(now, "l")
		for again := true; again; {
			began := now
			switch action, _ := d.Next(now); action {
			case Wait:
				again = false
			case Dump:
				now = now.Add(time.Second)
				if dumps == 0 {
					now = now.Add(15 * time.Second)
				}
				f.sum += 7
				d.Dumped(began, now, Snapshot{Fingerprint: f, Bytes: 5_300_000}, nil)
				longest = max(longest, now.Sub(last))
				last, dumps = now, dumps+1
			default:
				now = now.Add(time.Second / 2)
				moved := f
				moved.sum++
				d.Looked(began, now, moved, nil)
			}
		}
		now = now.Add(800 * time.Millisecond)
		d.Took(ReadyQuestion, now.Add(-800*time.Millisecond), now, nil)
		now = now.Add(200 * time.Millisecond)
	}
	if longest > 20*time.Second {
		t.Errorf("%v between two dumps", longest)
	}
	if b := d.Bucket(now); b.Size > 9*time.Second {
		t.Errorf("it holds %v after one dump that waited for 16 s", b.Size)
	}
	t.Logf("%d dumps, %v between two of them at most", dumps, longest)
}

// TestDetectorBusy: an Envoy that answers whether it is ready after four seconds does not answer
// looks within five. It is looked at again soon all the same, whatever each look waited.
func TestDetectorBusy(t *testing.T) {
	var d Detector
	now := time.Unix(1e9, 0)
	f := Fingerprint{Process: 1}
	d.Dumped(now, now.Add(time.Second), Snapshot{Fingerprint: f, Bytes: 5_300_000}, nil)
	now = now.Add(time.Second)
	looks, dumps := 0, 0
	for start := now; now.Sub(start) < 5*time.Minute; now = now.Add(time.Second) {
		d.Hint(now, "l")
		action, _ := d.Next(now)
		began := now
		switch {
		case action == Dump && dumps == 0: // the first hint asks for one
			now = now.Add(300 * time.Millisecond)
			d.Dumped(began, now, Snapshot{Fingerprint: f, Bytes: 5_300_000}, nil)
			dumps++
		case action == Dump:
			t.Fatalf("another dump after %v", now.Sub(start))
		case action == Look && looks < 2:
			now = now.Add(30 * time.Millisecond)
			d.Looked(began, now, f, nil)
			looks++
		case action == Look:
			now = now.Add(shortLimit)
			d.Looked(began, now, Fingerprint{}, ErrTimeout)
			looks++
		}
		began, now = now, now.Add(4*time.Second)
		d.Took(ReadyQuestion, began, now, nil)
	}
	if looks < 25 {
		t.Errorf("%d looks in five minutes", looks)
	}
	if b := d.Bucket(now); b.Level < b.Size-time.Second {
		t.Errorf("it has %v left of %v", b.Level, b.Size)
	}
}
