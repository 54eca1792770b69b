//go:build lab

package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/service-proxy-agent/service-proxy-agent/guestattr"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
)

// systemPath is where the machine's own programs are.
var systemPath = os.Getenv("PATH")

func writeProgram(path, text string) error { return os.WriteFile(path, []byte(text), 0o755) }

// foreign are names that others may give to what the agent tells of: they move a terminal's cursor,
// set its title and read backwards, end a line and begin another, are a page's markup, and are
// long.
var foreign = []string{
	"\x1b]0;owned\x07\x1b[2J\x1b[31mred\u009b5m\x7f\u202egnp.exe",
	"line\r\n2026-11-28T00:00:00Z ERROR: forged\r\nproxy-version: 0\t\v\f\x00end",
	`<script>alert(1)</script>"'&|; $(reboot) %s %n {{.}}`,
	// Envoy cuts its answer to the control plane anywhere, and what is then no UTF-8 ends its stream:
	// so not of 🐌 alone.
	"🐌long" + strings.Repeat("x", 1<<20),
}

// outputLimit is for all of an output of a command here, and lineLimit for one line of it.
const (
	outputLimit = 128 << 10
	lineLimit   = 16 << 10
)

// TestForeignText: names that others gave reach every output, and none as they stand: no control
// character comes to a terminal, and nothing is as long as they are.
func TestForeignText(t *testing.T) {
	t.Parallel()
	p := healthyVM(t)
	evil := services()
	for i, name := range foreign {
		// A long one stands in Envoy's statistics and routes as well, and costs it seconds.
		short := name[:min(len(name), 8<<10)]
		evil.Services = append(evil.Services, controlplane.Service{Name: short, Port: 81, HTTP: i == 2,
			Prefixes: controlplane.VIPs(fmt.Sprintf("10.40.0.%d", i+1)), Endpoints: endpoints(),
			Cluster: "cluster" + short})
		evil.Listeners = append(evil.Listeners,
			controlplane.RefusedListener("refused"+name, uint16(16001+i), "/root/"+name))
	}
	_, err := p.CP.Set(evil)
	must(t, err)
	_, err = p.a.Wait(within(t, 30*time.Second), "the refused listeners", func(s status.Status) bool {
		n := 0
		for _, f := range s.Findings {
			if f.ID == symptom.AccessLogUnwritable || f.ID == symptom.ListenerRejected {
				n++
			}
		}
		return n == len(foreign)
	})
	must(t, err)
	must(t, p.Platform.Wait(within(t, time.Minute), func() bool {
		return strings.HasPrefix(p.lastFailure(), "Envoy rejected listener ")
	}))
	p.outputs(t, "status", "status -o json", "doctor", "doctor -o json", "diff", "diff -o json",
		"explain 10.40.0.1:81", "explain 10.40.0.4:81 -o json")
	// What Envoy's log and stream say is foreign, too.
	_, err = p.CP.Set(services())
	must(t, err)
	p.CP.Refuse(7, "no"+foreign[0]+foreign[1]+foreign[2]+strings.Repeat("x", 4000))
	_, err = p.a.Wait(within(t, 30*time.Second), "the end of the stream", func(s status.Status) bool {
		return hasFinding(s, symptom.PermissionDenied)
	})
	must(t, err)
	p.outputs(t, "status", "doctor")
}

// outputs looks at all that the agent and its commands say.
func (p *patient) outputs(t *testing.T, commands ...string) {
	t.Helper()
	for _, command := range commands {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		out, stderr, _, err := p.a.RunAs(ctx, 0, p.a.Settings(), strings.Fields(command)...)
		cancel()
		must(t, err)
		clean(t, command, out+stderr)
	}
	_, metrics, err := p.a.Get("/metrics")
	must(t, err)
	clean(t, "/metrics", metrics)
	_, ready, err := p.a.Get("/healthz/ready")
	must(t, err)
	clean(t, "/healthz/ready", ready)
	clean(t, "the log", p.a.Log())
	clean(t, "the serial port", strings.ReplaceAll(p.Platform.Serial(), "\r\n", "\n"))
	for key, value := range p.Platform.GuestAttributes(guestattr.Namespace) {
		clean(t, "guest attribute "+key, value)
		if len(value) > guestattr.MaxValue || strings.Contains(value, "\n") {
			t.Errorf("guest attribute %s has %d bytes or two lines", key, len(value))
		}
	}
	for _, e := range p.Platform.LogEntries() {
		if text := fmt.Sprint(e.JSONPayload["message"]); len(text) > lineLimit {
			t.Errorf("an entry of Cloud Logging has %d bytes: %.200q", len(text), text)
		}
	}
}

// clean checks that a terminal shows the text as it is.
func clean(t *testing.T, what, text string) {
	t.Helper()
	if text == "" {
		t.Errorf("%s says nothing", what)
	}
	if len(text) > outputLimit {
		t.Errorf("%s: %d bytes", what, len(text))
	}
	told := 0
	for line := range strings.Lines(text) {
		if len(line) > lineLimit {
			t.Errorf("%s: a line of %d bytes: %.200q", what, len(line), line)
		}
		if !utf8.ValidString(line) {
			t.Errorf("%s: no UTF-8: %.200q", what, line)
		}
		bad := strings.IndexFunc(line, func(r rune) bool {
			return unicode.IsControl(r) && r != '\n' && r != '\t' || unicode.Is(unicode.Cf, r)
		})
		if bad < 0 {
			continue
		}
		if told++; told <= 3 {
			t.Errorf("%s: %q in %q", what, line[bad:min(bad+8, len(line))], line[max(0, bad-100):bad])
		}
	}
}
