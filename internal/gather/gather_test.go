package gather

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
)

// TestRun: what hangs, fails or is too much is named, in time, and the rest is there.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		never := make(chan struct{})
		defer close(never)
		gives := func(data string, gaps ...bundle.Gap) func(context.Context) (Answer, error) {
			return func(context.Context) (Answer, error) {
				return Answer{Data: []byte(data), Gaps: gaps}, nil
			}
		}
		var asked []string
		began := time.Now()
		files, gaps := Run(t.Context(), []Source{
			{Name: "second", After: "hung", Limit: time.Second, Most: 9, Mask: lines,
				Get: func(context.Context) (Answer, error) {
					asked = append(asked, time.Since(began).String())
					return Answer{Data: []byte("x")}, nil
				}},
			{Name: "hung", Limit: 3 * time.Second, Mask: lines, Get: func(context.Context) (Answer, error) {
				<-never
				return Answer{}, nil
			}},
			{Name: "partial", Limit: time.Second, Most: 99, Mask: lines,
				Get: func(ctx context.Context) (Answer, error) {
					<-ctx.Done()
					return Answer{Data: []byte("half"), Cut: "its end"}, ctx.Err()
				}},
			{Name: "late", After: "hung", Limit: time.Hour, Mask: lines,
				Get: func(ctx context.Context) (Answer, error) {
					<-never
					return Answer{}, ctx.Err()
				}},
			{Name: "last", After: "late", Limit: time.Second, Mask: lines, Get: gives("never")},
			{Name: "fails", Limit: time.Second, Mask: lines, Get: func(context.Context) (Answer, error) {
				return Answer{}, errors.New("token=s3cr3t\x1b[31m\nno")
			}},
			{Name: "absent", Limit: time.Second, Mask: lines,
				Get: func(context.Context) (Answer, error) { return Answer{}, errAbsent }},
			{Name: "part", Limit: time.Second, Most: 99, Mask: lines, Get: gives("a", bundle.Gap{Name: "b", Why: "c"})},
			{Name: "much", Limit: time.Second, Most: 4, Mask: lines, Get: gives("123456")},
			{Name: "no json", Limit: time.Second, Most: 99, Mask: config, Get: gives("[5, x")},
			{Name: "empty", Limit: time.Second, Most: 99, Mask: lines, Get: gives("")},
		})
		var have []string
		for _, f := range files {
			have = append(have, f.Name+"|"+string(f.Data)+"|"+f.Cut)
		}
		if diff := cmp.Diff([]string{"second|x\n|", "partial|half\n|its end", "part|a\n|",
			"much|1234|its end: more than 4 bytes",
			"no json|[\n 5\n]\n|its end, which could not be read: invalid character 'x' looking for beginning of value",
			"empty||"}, have); diff != "" {
			t.Errorf("files (-want +have):\n%s", diff)
		}
		if diff := cmp.Diff([]bundle.Gap{{Name: "hung", Why: "no answer within 3s"},
			{Name: "partial", Why: "no answer in time: context deadline exceeded"},
			{Name: "late", Why: "no answer within 1h0m0s"}, {Name: "last", Why: "not asked: the time was over"},
			{Name: "fails", Why: "token=[...] no"}, {Name: "b", Why: "c"}}, gaps); diff != "" {
			t.Errorf("gaps (-want +have):\n%s", diff)
		}
		if diff := cmp.Diff([]string{(3*time.Second + grace).String()}, asked); diff != "" {
			t.Errorf("asked (-want +have):\n%s", diff)
		}
		if took := time.Since(began); took > limit+grace {
			t.Errorf("it took %v", took)
		}
	})
}

// TestInterrupted: Ctrl-C ends it at once.
func TestInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		began := time.Now()
		Run(ctx, []Source{{Name: "a", Limit: time.Hour, Mask: lines,
			Get: func(ctx context.Context) (Answer, error) {
				<-ctx.Done()
				return Answer{}, ctx.Err()
			}}})
		if took := time.Since(began); took != time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

func TestKept(t *testing.T) {
	for _, tt := range []struct {
		name      string
		last      bool
		writes    []string
		want, cut string
	}{
		{"all", false, []string{"ab\n", "cd\n"}, "ab\ncd\n", ""},
		{"all, at its end", true, []string{"ab\n", "cd\n"}, "ab\ncd\n", ""},
		{"the first", false, []string{"abc\n", "def\n", "g\n"}, "abc\n", "its end: more than 6 bytes"},
		{"the last", true, []string{"abc\n", "def\n", "g\n"}, "def\ng\n", "its beginning: more than 6 bytes"},
		{"the last of much", true, []string{strings.Repeat("abc\n", 9), "de\n"}, "de\n", "its beginning: more than 6 bytes"},
		{"one line that is too long", false, []string{"abcdefgh"}, "", "its end: more than 6 bytes"},
		{"the same at its end", true, []string{"abcdefgh"}, "", "its beginning: more than 6 bytes"},
		{"exactly", true, []string{"ab\n", "cde"}, "ab\ncde", ""},
	} {
		k := &kept{most: 6, last: tt.last}
		for _, w := range tt.writes {
			if n, err := k.Write([]byte(w)); n != len(w) || err != nil {
				t.Errorf("%s: %d, %v", tt.name, n, err)
			}
		}
		if a := k.answer(); string(a.Data) != tt.want || a.Cut != tt.cut {
			t.Errorf("%s: %q, %q, want %q, %q", tt.name, a.Data, a.Cut, tt.want, tt.cut)
		}
	}
}
