package agent

import (
	"fmt"
	"slices"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Warning is one warning and its history.
type Warning struct {
	Failure
	// Gone is when it was last seen to go, while that is not told yet; zero: it is there.
	Gone   time.Time `json:"gone,omitzero"`
	Worded time.Time `json:"worded"` // when its text last changed
}

// Warnings are those that last as far as is told, and some that ended. They are told outside while
// nothing worse is there. One that comes and goes must not write a guest attribute each time, so
// they are slow where errors are not: one counts once it has stood for some seconds, says other
// words at most once a minute, and the end of one that has come before waits to be sure.
type Warnings struct {
	Lasting []Warning `json:"lasting,omitempty"` // oldest first
	Ended   []Failure `json:"ended,omitempty"`   // newest last
}

const (
	// warningAfter is how long a warning must stand to count: what passes while Envoy starts does not.
	warningAfter = 5 * time.Second
	// wordsEvery is how often one that lasts may say other words.
	wordsEvery = time.Minute
	// maxEnded is how many that ended are known when they come again.
	maxEnded = 8
	// mostAway is the longest that one must have been away to be over.
	mostAway = 10 * time.Minute
	// recentError is how long before a warning an error may have ended to be told behind it.
	recentError = 24 * time.Hour
	// warningsLate is how long a run takes to find all that the one before has warned of.
	warningsLate = 5 * time.Minute
)

// away is how long a warning must have been away to be over: the first time not at all, and then
// the longer the more often it has come.
func (w Warning) away() time.Duration {
	return min(time.Duration(w.Times-1)*time.Minute, mostAway)
}

// happened says of a kind of warning that it is an event, over when it is seen.
func happened(id symptom.ID) bool { return id == symptom.DriftRepaired }

// counts says whether a finding is a warning to be told outside. That guest attributes are disabled
// can be read in none.
func (w Warnings) counts(f symptom.Finding, now time.Time) bool {
	return f.Severity == symptom.Warning && f.ExplainedBy == "" &&
		f.ID != symptom.GuestAttributesOff &&
		(happened(f.ID) || !f.Since.IsZero() && now.Sub(f.Since) >= warningAfter)
}

// next are the warnings after a pass with these findings, worst first, each of which says since
// when it stands. Those that stay last without a finding that tells of them.
func (w Warnings) next(findings []symptom.Finding, now time.Time,
	stays func(Failure) bool) Warnings {
	now = now.UTC().Truncate(time.Second)
	found := map[which]symptom.Finding{} // warnings of whatever age
	var count []symptom.Finding
	for _, f := range slices.Backward(findings) { // the worst last, and of several the first
		is := which{f.ID, f.Key}
		if f.Severity == symptom.Warning && f.ExplainedBy == "" {
			found[is] = f
		}
		if w.counts(f, now) {
			count = append(count, f)
		}
	}
	next := Warnings{Ended: w.Ended}
	lasts := map[which]bool{}
	for _, was := range w.Lasting {
		is := was.which()
		switch f, there := found[is]; {
		case there:
			was.Gone = time.Time{}
			if text := f.Text(); text != was.Text && now.Sub(was.Worded) >= wordsEvery {
				was.Text, was.Worded = text, now
			}
		case stays(was.Failure):
		default:
			if was.Gone.IsZero() {
				was.Gone = now
			}
			if now.Sub(was.Gone) >= was.away() {
				if was.Last = was.Gone; happened(was.ID) {
					was.Last = was.Worded
				}
				next.Ended = append(slices.Clone(next.Ended), was.Failure)
				next.Ended = next.Ended[max(0, len(next.Ended)-maxEnded):]
				continue
			}
		}
		lasts[is] = true
		next.Lasting = append(next.Lasting, was)
	}
	for _, f := range count {
		if is := (which{f.ID, f.Key}); !lasts[is] {
			lasts[is] = true
			next.Lasting = append(next.Lasting, next.begin(f, now))
		}
	}
	return next
}

// begin is a warning that counts from now on, the same one as before if that is not long ago.
func (w *Warnings) begin(f symptom.Finding, now time.Time) Warning {
	first := now
	if !f.Since.IsZero() {
		first = f.Since.UTC().Truncate(time.Second)
	}
	is := Warning{Failure: Failure{ID: f.ID, Key: f.Key, Text: f.Text(), First: first, Times: 1},
		Worded: now}
	for i, was := range slices.Backward(w.Ended) {
		if was.is(f) {
			if first.Sub(was.Last) < forgetAfter {
				is.First, is.Times = was.First, was.Times+1
			}
			w.Ended = slices.Delete(slices.Clone(w.Ended), i, i+1)
			break
		}
	}
	return is
}

// whichOf are those that last.
func (w Warnings) whichOf() map[which]bool {
	in := make(map[which]bool, len(w.Lasting))
	for _, f := range w.Lasting {
		in[f.which()] = true
	}
	return in
}

func (w Warnings) lasts(is which) bool {
	return slices.ContainsFunc(w.Lasting, func(f Warning) bool { return f.which() == is })
}

func (w Warnings) equal(v Warnings) bool {
	return slices.Equal(w.Lasting, v.Lasting) && slices.Equal(w.Ended, v.Ended)
}

// over is the one that ended last.
func (w Warnings) over() Failure {
	if n := len(w.Ended); n > 0 {
		return w.Ended[n-1]
	}
	return Failure{}
}

// string is what is told of them while no error lasts: the newest that lasts, else the last one,
// and behind it an error that ended not long before it came; "" where that error, which is over, is
// what is to be told.
func (w Warnings) string(over Failure) string {
	var is Failure
	var text string
	if n := len(w.Lasting); n > 0 {
		newest := w.Lasting[n-1]
		if is = newest.Failure; happened(is.ID) {
			is.Last = newest.Worded
		}
		text = is.string("warning; since", n-1)
	} else if is = w.over(); is.Last.After(over.Last) {
		text = is.string("", 0)
	}
	if text != "" && over.Text != "" && is.First.Sub(over.Last) < recentError {
		// Half of the value is the warning's at most.
		text = guestattr.OneLine(text, guestattr.MaxValue/2) + "; before that: " + over.String()
	}
	return text
}

// string is String of a failure that since begins the times of, with so many more.
func (f Failure) string(since string, more int) string {
	if more > 0 {
		f.Text += fmt.Sprintf("; and %d more, see `service-proxy-agent status`", more)
	}
	times := "1 time"
	if f.Times != 1 {
		times = fmt.Sprintf("%d times", f.Times)
	}
	switch {
	case f.Text == "":
		return ""
	case f.Last.IsZero():
		return fmt.Sprintf("%s (%s %s, %s)", f.Text, since, f.First.Format(time.RFC3339), times)
	}
	return fmt.Sprintf("%s (over; %s to %s, %s)", f.Text, f.First.Format(time.RFC3339),
		f.Last.Format(time.RFC3339), times)
}
