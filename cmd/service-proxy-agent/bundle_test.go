package main

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// A secret that a line break cuts into two is none that a mask of lines would find. And what has no
// secret is the same as without a mask.
func TestMaskedTexts(t *testing.T) {
	at := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	both := func(secret string) (doctorText, statusText [2]string) {
		var f symptom.Facts
		f.Envoy.Err = errors.Join(envoyadmin.ErrRefused, errors.New(strings.Repeat("word ", 9)+secret))
		f.Unseen = map[symptom.Source]string{symptom.FromKernel: "needs root, " + secret}
		r := doctor.New(symptom.Examine(f), doctor.Options{Version: "1", Time: at, FailOn: symptom.Error, Unseen: f.Unseen})
		s := status.Status{Version: "1", Heartbeat: at, Started: at, Mode: "hold", NotReady: "it waits",
			LastFailure: strings.Repeat("word ", 9) + secret, Findings: r.Findings,
			Services: []status.Service{{Name: "web", Addresses: []string{"10.0.0.1:80"}}}}
		rm, err := masked(r)
		if err != nil {
			t.Fatal(err)
		}
		sm, err := masked(s)
		if err != nil {
			t.Fatal(err)
		}
		for i, r := range []doctor.Report{r, rm} {
			var b bytes.Buffer
			if err := r.Text(&b, terminal.Style(false), 60); err != nil {
				t.Fatal(err)
			}
			doctorText[i] = b.String()
		}
		for i, s := range []status.Status{s, sm} {
			var b bytes.Buffer
			if err := s.Text(&b, status.TextOptions{Now: at, Width: 60}); err != nil {
				t.Fatal(err)
			}
			statusText[i] = b.String()
		}
		return doctorText, statusText
	}
	d, s := both("nothing to hide")
	if d[0] != d[1] || s[0] != s[1] {
		t.Errorf("masked:\n%s%s\nwant:\n%s%s", d[1], s[1], d[0], s[0])
	}
	d, s = both("Bearer s3cr3t")
	if !strings.Contains(d[0], "s3cr3t") || !strings.Contains(s[0], "s3cr3t") {
		t.Errorf("the secret is not told of at all:\n%s\n%s", d[0], s[0])
	}
	if strings.Contains(d[1]+s[1], "s3cr3t") {
		t.Errorf("a secret is told:\n%s\n%s", d[1], s[1])
	}
}

// What cannot be written is said before anything is asked, and leaves nothing.
func TestBundleUnwritable(t *testing.T) {
	dir := t.TempDir()
	there := dir + "/there"
	if err := os.WriteFile(there, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{there, dir, dir + "/no/such/b.tgz", there + "/b.tgz", "/proc/b.tgz"} {
		if code := execute(t.Context(), []string{"bundle", "-f", path}); code != exitcode.NotKnown {
			t.Errorf("%s: exit code %d", path, code)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}
