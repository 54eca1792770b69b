package envoywatch

import (
	"time"

	"google.golang.org/grpc/codes"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// connectionEvery is how often Envoy is asked whether its stream stands, if the pace of that
// question allows: a connection that is refused is not in its log.
const connectionEvery = 15 * time.Second

// stream is how one Envoy's stream to its control plane stands. It is pure: the time is given to
// it, and it asks nothing itself. The zero value knows nothing against the stream.
//
//	s.closed(now, event)       the log says that it ended
//	s.spoke(now)               the log says that the control plane sent something
//	s.due(now)                 is it time to ask Envoy? if so: s.asked = now
//	s.answered(now, …)         Envoy's answer to what was asked then
type stream struct {
	end     *symptom.Stream // how it last ended; nil: it stands, as far as is known
	last    *symptom.Stream // how one last ended, whatever came since; nil: none is known of
	ends    int             // since the control plane last spoke
	without int             // answers in a row that there is no stream
	asked   time.Time       // when Envoy was last asked
	heard   time.Time       // when the control plane last spoke
	stands  bool            // a sign of the stream was the last that was seen
}

// apart says whether Envoy has no stream, whether its log says why or not.
func (s stream) apart() bool { return s.without > 1 }

// closed takes an end of the stream, or several equal ones, from Envoy's log.
func (s *stream) closed(now time.Time, e envoyadmin.LogEvent) {
	s.ends += e.Count
	s.stands = false
	s.end = &symptom.Stream{Target: e.Target, Code: e.Code, Message: e.Message, When: now}
	s.last = s.end
}

// spoke takes a sign from the control plane. It says whether that changes what a View tells.
func (s *stream) spoke(now time.Time) (news bool) {
	news = s.end != nil || s.apart()
	*s = stream{asked: s.asked, heard: now, stands: true, last: s.last}
	return news
}

// after is the stream of the next process, which was met by questions that began at this time: only
// what the log told since is of it. How often Envoy is asked does not start anew: a process that
// has just started is not connected yet, and two answers in a row would say so.
func (s stream) after(began time.Time) stream {
	next := stream{asked: s.asked, heard: s.heard, last: s.last}
	if s.end != nil && s.end.When.After(began) {
		next.end, next.ends = s.end, s.ends
	}
	return next
}

// due says whether it is time to ask Envoy: now and then, and once its log tells no further end.
func (s stream) due(now time.Time) bool {
	return s.silent(now) || now.Sub(s.asked) >= connectionEvery
}

// answered takes Envoy's answer to the question of this time; blocked is whether our own way to the
// control plane fails. connected_state flaps to 1 at each attempt, so one answer that the stream
// stands means nothing while our own way is blocked, and two that it does not are needed.
// See docs/design/facts.md#envoy-connected-flaps.
func (s *stream) answered(asked time.Time, connected, blocked bool) {
	switch {
	case !connected && asked.Before(s.heard): // it has spoken since
	case !connected:
		s.without++
		s.stands = s.stands && !s.apart()
	case !blocked:
		s.without = 0
		if s.silent(asked) { // else it may have ended behind the answer
			s.end = nil
		}
		s.stands = s.end == nil
	}
}

// silent says whether the log has told of no end for so long that the stream must stand.
func (s stream) silent(now time.Time) bool {
	return s.end != nil && now.Sub(s.end.When) > silence(s.end.Code, s.ends)
}

// silence is how long the log says nothing after the n-th end of a stream in a row if the next one
// stands. Envoy doubles its pause from 0.5 to 30 s, takes a random part of it, and logs each end at
// once; but those of codes that it hopes will pass only once they have lasted for 30 s
// (source/extensions/config_subscription/grpc/grpc_stream.h). Log events that repeat are told each
// 5 s.
// See docs/design/facts.md#envoy-does-not-say-why and docs/design/facts.md#envoy-connected-flaps.
func silence(code, n int) time.Duration {
	const longest = 75 * time.Second
	switch codes.Code(code) {
	case codes.DeadlineExceeded, codes.ResourceExhausted, codes.Unavailable:
		return longest
	}
	return min(longest, 6*time.Second+500*time.Millisecond<<min(n, 10))
}
