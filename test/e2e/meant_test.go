//go:build lab

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// brakeIs sets the brake's key on the instance.
func brakeIs(value string) func(*testing.T, *patient) func() {
	return func(_ *testing.T, p *patient) func() {
		p.Platform.SetAttribute(symptom.InterceptionMetadata, value)
		return func() { p.Platform.DeleteAttribute(symptom.InterceptionMetadata) }
	}
}

// brakedAndDrained has Envoy close its ports once nothing leads there.
func brakedAndDrained(t *testing.T, p *patient) func() {
	release := brakeIs("off")(t, p)
	_, err := p.a.Wait(within(t, 20*time.Second), "the brake", func(s status.Status) bool {
		return s.Mode == "off" && s.Ready
	})
	must(t, err)
	undrain := drained(t, p)
	return func() { undrain(); release() }
}

// jumpsOut: no jump is in, and the chains are.
func jumpsOut(t *testing.T, p *patient) {
	t.Helper()
	rules := chains(t, p.Mesh)
	if strings.Contains(rules, "-j SERVICE_PROXY_OUTPUT") ||
		!strings.Contains(rules, "-A SERVICE_PROXY_SERVICE_CIDRS") {
		t.Errorf("with the brake on the rules are:\n%s", rules)
	}
}

// units is the folder that the VM's agent sees as /etc/systemd/system.
func (p *patient) units() string { return filepath.Join(p.Dir, "units") }

// vmWithUnits has units of its own.
func vmWithUnits(t *testing.T) *patient {
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	p := &patient{Mesh: m, a: m.NewAgent()}
	must(t, mkdir(p.units()))
	p.a.Under = []string{"unshare", "-m", "sh", "-ec", `
		mount --bind ` + p.units() + ` /etc/systemd/system
		exec "$@"`, "sh"}
	return attend(t, p)
}

// closedAgentUnit is a unit as far as is known of Google's, in the place that wins over ours. Here
// is no systemd that would start it: TestTakeOver of test/box has one that runs.
func closedAgentUnit(t *testing.T, p *patient) func() {
	file := filepath.Join(p.units(), "service-proxy-agent.service")
	must(t, os.WriteFile(file, []byte("[Service]\nExecStart=/usr/local/bin/other-agent\n"), 0o644))
	return func() { must(t, os.Remove(file)) }
}

// cloned is a VM whose disk has what another one's agent has kept: in another boot, of another
// machine. It is told for ten minutes, but not by a second run.
func cloned(t *testing.T, p *patient) func() {
	kept := regexp.MustCompile(`"(instance|machine|boot)": ?"([^"]*)"`)
	changed := 0
	// A run that is stopped before it was told the VM's id keeps its state without one.
	for ctx := within(t, 20*time.Second); !saysWhose(t, p); time.Sleep(20 * time.Millisecond) {
		must(t, ctx.Err())
	}
	restarts(t, p, func() {
		files, err := filepath.Glob(filepath.Join(p.a.StateDir(), "*.json"))
		must(t, err)
		for _, file := range files {
			text, err := os.ReadFile(file)
			must(t, err)
			others := kept.ReplaceAllStringFunc(string(text), func(one string) string {
				changed++
				m := kept.FindStringSubmatch(one)
				if m[1] == "instance" {
					return `"instance":"4711"`
				}
				return fmt.Sprintf("%q:%q", m[1], strings.Repeat("4711", 8))
			})
			must(t, os.WriteFile(file, []byte(others), 0o600))
		}
	})
	if changed == 0 {
		t.Fatal("nothing in the state folder says whose it is")
	}
	return func() { restarts(t, p, func() {}) }
}

// saysWhose says whether some of what the agent keeps says of which instance it is.
func saysWhose(t *testing.T, p *patient) bool {
	files, err := filepath.Glob(filepath.Join(p.a.StateDir(), "*.json"))
	must(t, err)
	return slices.ContainsFunc(files, func(file string) bool {
		text, err := os.ReadFile(file)
		must(t, err)
		return strings.Contains(string(text), `"instance"`)
	})
}
