package envoywatch

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
)

// TestStream plays what the log and Envoy say of a stream. A step is "SECONDS EVENT": closed CODE,
// closed CODE xN, spoke; ask, if it is due, with the answer up or down, and blocked if our own way
// to the control plane is.
func TestStream(t *testing.T) {
	for _, tt := range []struct {
		name  string
		steps []string
		want  string // after the last step: end or stands, apart, due
	}{
		{"nothing known: it is asked for at once", nil, "stands due"},
		{"then each 15 s", []string{"0 ask up", "14.9"}, "stands"},
		{"then each 15 s", []string{"0 ask up", "15"}, "stands due"},
		{"one answer that there is none means nothing", []string{"0 ask down"}, "stands"},
		{"two do", []string{"0 ask down", "15 ask down"}, "stands apart"},
		{"but in a row", []string{"0 ask down", "15 ask up", "30 ask down"}, "stands"},
		{"it comes back", []string{"0 ask down", "15 ask down", "30 ask up"}, "stands"},
		{"an attempt looks like a stream",
			[]string{"0 ask down", "15 ask down", "30 ask up blocked"}, "stands apart"},
		{"and none counts while blocked too", []string{"0 ask down blocked", "15 ask down blocked"},
			"stands apart"},
		{"two in a row in spite of an attempt",
			[]string{"0 ask down", "15 ask up blocked", "30 ask down"}, "stands apart"},

		{"closed", []string{"0 ask up", "1 closed 7"}, "ended 7"},
		{"the newest end counts", []string{"0 ask up", "1 closed 7", "2 closed 16"}, "ended 16"},
		{"the control plane spoke", []string{"0 ask up", "1 closed 7", "2 spoke"}, "stands"},
		{"it spoke, and two more answers are needed",
			[]string{"0 ask down", "1 spoke", "15 ask down"}, "stands"},
		{"it spoke while apart", []string{"0 ask down", "15 ask down", "16 spoke"}, "stands"},

		// 6 s and half a second doubled: a next end would be in the log by then.
		{"silent after one end", []string{"0 ask up", "1 closed 7", "8"}, "ended 7"},
		{"silent after one end", []string{"0 ask up", "1 closed 7", "8.1"}, "ended 7 due"},
		{"after three it may take longer", []string{"0 ask up", "1 closed 7 x3", "11"}, "ended 7"},
		{"after three it may take longer", []string{"0 ask up", "1 closed 7 x3", "11.1"},
			"ended 7 due"},
		{"ends add up", []string{"0 ask up", "1 closed 7", "1 closed 7 x2", "11"}, "ended 7"},
		{"ends add up", []string{"0 ask up", "1 closed 7", "1 closed 7 x2", "11.1"}, "ended 7 due"},
		{"a word begins them anew",
			[]string{"0 ask up", "0 closed 7 x3", "1 spoke", "1 closed 7", "8.1"}, "ended 7 due"},
		{"silent, and it stands", []string{"0 ask up", "1 closed 7", "8.1 ask up"}, "stands"},
		{"silent, and it does not", []string{"0 ask up", "1 closed 7", "8.1 ask down"},
			"ended 7 due"},
		{"silent, and blocked", []string{"0 ask up", "1 closed 7", "8.1 ask up blocked"},
			"ended 7 due"},
		{"not silent, and it stands: an attempt",
			[]string{"0 ask up", "9 closed 7", "15 ask up"}, "ended 7"},
		{"Unavailable is told late", []string{"0 ask up", "1 closed 14", "15 ask up", "16.1"},
			"ended 14"},
		{"Unavailable is told late",
			[]string{"0 ask up", "1 closed 14", "70 ask up", "76"}, "ended 14"},
		{"Unavailable is told late",
			[]string{"0 ask up", "1 closed 14", "70 ask up", "76.1"}, "ended 14 due"},
		{"ends before the silence still count",
			[]string{"0 ask up", "0 closed 7 x2", "8.1 ask up", "9 closed 7", "19"}, "ended 7"},
	} {
		var s stream
		start := time.Unix(1700000000, 0)
		now := start
		for _, step := range tt.steps {
			at, event, _ := strings.Cut(step, " ")
			d, err := time.ParseDuration(at + "s")
			if err != nil {
				t.Fatal(err)
			}
			now = start.Add(d)
			word, rest, _ := strings.Cut(event, " ")
			switch word {
			case "closed":
				e := envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Count: 1}
				fmt.Sscanf(rest, "%d x%d", &e.Code, &e.Count)
				s.closed(now, e)
			case "spoke":
				s.spoke(now)
			case "ask":
				if !s.due(now) {
					t.Errorf("%s: %q: not due", tt.name, step)
				}
				s.asked = now
				s.answered(now, strings.HasPrefix(rest, "up"), strings.HasSuffix(rest, "blocked"))
			}
		}
		if got := told(s, now); got != tt.want {
			t.Errorf("%s: after %q it is %q, want %q", tt.name, tt.steps, got, tt.want)
		}
	}
}

func told(s stream, now time.Time) string {
	text := "stands"
	if s.end != nil {
		text = fmt.Sprintf("ended %d", s.end.Code)
	}
	if s.apart() {
		text += " apart"
	}
	if s.due(now) {
		text += " due"
	}
	return text
}

// TestStreamOvertaken: what the log tells while Envoy is asked is newer than Envoy's answer.
func TestStreamOvertaken(t *testing.T) {
	start := time.Unix(1700000000, 0)
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	closed := envoyadmin.LogEvent{Kind: envoyadmin.StreamClosed, Code: 7, Count: 1}

	var s stream
	s.closed(at(0), closed)
	s.closed(at(21), closed)
	s.answered(at(20), true, false) // silent when it was asked
	if s.end == nil {
		t.Error("an answer hides an end that came after it")
	}

	s = stream{without: 1}
	s.spoke(at(21))
	s.answered(at(20), false, false)
	if s.without != 0 {
		t.Error("an answer counts that is older than what the control plane said")
	}
	s.answered(at(21), false, false)
	if s.without != 1 {
		t.Error("an answer does not count that is not older")
	}
}

// TestStreamNews: only what changes a View is worth one.
func TestStreamNews(t *testing.T) {
	now := time.Unix(1700000000, 0)
	closed := stream{}
	closed.closed(now, envoyadmin.LogEvent{Count: 1})
	for _, tt := range []struct {
		s    stream
		want bool
	}{
		{stream{}, false}, {stream{without: 1}, false}, {stream{without: 2}, true}, {closed, true},
	} {
		s := tt.s
		if got := s.spoke(now); got != tt.want {
			t.Errorf("%+v: %v, want %v", tt.s, got, tt.want)
		}
		if s.end != nil || s.apart() {
			t.Errorf("%+v: it still says %+v", tt.s, s)
		}
	}
}

// TestStreamAfter: another process begins with nothing but what the log told since it was met, and
// with the pace of questions.
func TestStreamAfter(t *testing.T) {
	start := time.Unix(1700000000, 0)
	s := stream{without: 2, asked: start.Add(-time.Second), heard: start.Add(-time.Minute)}
	s.closed(start, envoyadmin.LogEvent{Code: 7, Count: 3})
	for _, tt := range []struct {
		met  time.Time
		ends int
	}{{start, 0}, {start.Add(time.Second), 0}, {start.Add(-time.Second), 3}} {
		next := s.after(tt.met)
		if next.ends != tt.ends || (next.end != nil) != (tt.ends > 0) {
			t.Errorf("met at %v: %+v, want %d ends", tt.met, next, tt.ends)
		}
		if next.without != 0 || next.asked != s.asked || next.heard != s.heard {
			t.Errorf("met at %v: %+v of %+v", tt.met, next, s)
		}
	}
}

func TestSilence(t *testing.T) {
	for _, tt := range []struct {
		code, n int
		want    time.Duration
	}{
		{7, 0, 6500 * time.Millisecond}, {7, 1, 7 * time.Second}, {7, 2, 8 * time.Second},
		{7, 7, 70 * time.Second}, {7, 8, 75 * time.Second}, {7, 1000, 75 * time.Second},
		{0, 1, 7 * time.Second}, {16, 1, 7 * time.Second},
		{4, 1, 75 * time.Second}, {8, 1, 75 * time.Second}, {14, 1, 75 * time.Second},
	} {
		if got := silence(tt.code, tt.n); got != tt.want {
			t.Errorf("code %d, end %d: %v, want %v", tt.code, tt.n, got, tt.want)
		}
	}
}
