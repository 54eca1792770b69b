package envoyadmin

import (
	"slices"
	"time"
)

// hints are what the log told that no question has looked into yet, and how soon one may: at once
// after a quiet time, and ever later where hints lead to nothing. The zero value has none.
type hints struct {
	pending  bool
	during   bool          // one came since Next asked for the question under way
	named    bool          // each names a listener
	stale    bool          // all came before the last answer was made, which may hold what they are of
	last     time.Time     // when the newest came
	stranger bool          // one names none of the last full dump
	gap      time.Duration // after the last question; 0: at once
	redialed bool          // the last question was for a hint too, and showed nothing
	early    bool          // the last question that showed a change was asked for by a hint
}

// hint takes one in. names are those of the last full dump, sorted.
func (h *hints) hint(now time.Time, listener string, names []string) {
	if !h.pending {
		h.named, h.stranger = true, false
	}
	h.named = h.named && listener != ""
	if _, known := slices.BinarySearch(names, listener); !known {
		h.stranger = true
	}
	h.pending, h.during, h.stale, h.last = true, true, false, now
}

// straight says whether they are as good as a look that shows a change: Envoy's log names a
// listener where one has changed, and nothing where an update changes none.
func (h *hints) straight() bool { return h.named && !h.stale }

// answered takes in whether an answer showed a change, when it was made, and idle, the pace without
// hints. It says whether the next question, soon, shall go over a new connection (Detector.Looked).
func (h *hints) answered(moved bool, made time.Time, idle time.Duration) (redial bool) {
	redial = h.pending && !moved && !h.redialed
	h.redialed = h.pending && !moved
	if h.redialed {
		h.gap = min(max(soon, 2*h.gap), idle)
	} else {
		h.gap = 0
	}
	// one that came while Envoy answered may be of something that the answer does not hold
	h.pending, h.stale = h.during || redial, !h.last.After(made)
	return redial
}

// failed takes in that there was no answer, and how long nothing else is asked.
func (h *hints) failed(gap time.Duration) {
	h.gap, h.pending = gap, h.during
}
