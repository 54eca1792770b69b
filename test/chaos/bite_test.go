//go:build lab

package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/systemd"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
)

// breaches break promises, and nothing excuses them.
func breaches() []Fault {
	run := func(w *World, command string) error {
		fields := strings.Fields(command)
		_, err := w.VM.Run(context.Background(), fields[0], fields[1:]...)
		return err
	}
	reset := "-p tcp -j REJECT --reject-with tcp-reset"
	rules := []string{
		"iptables -w -t nat -I OUTPUT -p tcp -d 10.10.0.2 -j REDIRECT --to-ports 7000", // captured
		"iptables -w -t nat -I OUTPUT -p tcp -d 10.10.0.1 -j RETURN",                   // escaped
		fmt.Sprintf("ip6tables -w -t nat -I OUTPUT -p tcp -d fd10::2 -m owner --uid-owner %d -j REDIRECT "+
			"--to-ports 15001", lab.EnvoyUID), // trapped
		"ip6tables -w -I OUTPUT -d fd77::1 " + reset,         // blocked, severed
		"iptables -w -I OUTPUT -d 10.20.0.3 " + reset,        // refused
		"iptables -w -I INPUT -m tcp --dport 15001 " + reset, // cut
		"iptables -w -t mangle -D OUTPUT -d 10.88.0.1/32 -p tcp -m comment --comment canary-output",
		"ip6tables -w -t mangle -Z OUTPUT",
	}
	one := func(name string, do func(w *World) (func() error, error)) Fault {
		return Fault{Name: name, Weight: 1, Begin: func(w *World, _ *rand.Rand) (func() error, error) {
			return do(w)
		}}
	}
	return []Fault{
		one("breach-stopped", func(w *World) (func() error, error) {
			pid, _ := w.AgentPID()
			err := syscall.Kill(pid, syscall.SIGSTOP) // or it would repair
			for _, rule := range rules {
				err = errors.Join(err, run(w, rule))
			}
			return func() (err error) {
				for _, rule := range rules {
					if strings.Contains(rule, " -I ") {
						err = errors.Join(err, run(w, strings.Replace(rule, " -I ", " -D ", 1)))
					}
				}
				return errors.Join(err, syscall.Kill(pid, syscall.SIGCONT))
			}, err
		}),
		one("breach-death", func(w *World) (func() error, error) {
			w.Agent.Kill()
			return w.StartAgent, nil
		}),
		one("breach-brake", func(w *World) (func() error, error) { // it is on, and nobody was told
			w.projectBrake(true)
			return func() error { w.projectBrake(false); return nil }, nil
		}),
		one("breach-words", func(w *World) (func() error, error) {
			for range 5 {
				req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, "http://"+
					netip.AddrPortFrom(lab.MetadataAddr, 80).String()+
					"/computeMetadata/v1/instance/guest-attributes/other/", nil)
				if err != nil {
					return nil, err
				}
				req.Header.Set("Metadata-Flavor", "Google")
				resp, err := w.VM.HTTP().Do(req)
				if err != nil {
					return nil, err
				}
				resp.Body.Close()
			}
			return nil, errors.Join(os.Remove(filepath.Join(w.ofAgent(w.Agent.RunDir()), systemd.ReadyFile)),
				os.WriteFile(filepath.Join(w.Mesh.Dir, "left"), nil, 0o644))
		}),
	}
}

// TestWatchersBite: each broken promise is observed. That those which are kept are not is what
// every game shows.
func TestWatchersBite(t *testing.T) {
	t.Parallel()
	for _, backend := range lab.Backends {
		t.Run(string(backend), func(t *testing.T) {
			t.Parallel()
			opts := options(t)
			opts.Log, opts.More = t.Logf, breaches()
			for name, c := range map[string]struct {
				sequence []Event
				want     []Kind
			}{
				"rules": {[]Event{{At: 3 * time.Second, Name: "breach-stopped", Hold: 18 * time.Second},
					{At: 22 * time.Second, Name: Calm}},
					[]Kind{Blocked, Captured, Cut, Escaped, Foreign, Refused, Severed, Silent, Trapped}},
				"brake": {[]Event{{At: time.Second, Name: "breach-brake", Hold: 8 * time.Second},
					{At: 10 * time.Second, Name: Calm}}, []Kind{Lied}},
				"words": {[]Event{{At: time.Second, Name: "breach-death", Hold: time.Second},
					{At: 6 * time.Second, Name: "breach-words"},
					{At: 6500 * time.Millisecond, Name: Calm}}, []Kind{Died, Left, Lied, Spent}},
			} {
				t.Run(name, func(t *testing.T) {
					r, err := Play(t.Context(), Setting{Backend: string(backend), Seed: 1}, c.sequence, opts)
					if err != nil {
						t.Fatal(err)
					}
					for _, kind := range c.want {
						if !slices.ContainsFunc(r.Violations, func(v Violation) bool { return v.Kind == kind }) {
							t.Errorf("%q was broken and not seen:\n%s", kind, strings.Join(Summary(r.Violations), "\n"))
						}
					}
				})
			}
		})
	}
}
