//go:build box

package box

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// typed runs the one command in the README's indented blocks that matches, in root's folder, with
// what a user puts in for its placeholders. What explains it stands behind two blanks.
func (v *VM) typed(pattern string, put ...string) (out string, code int) {
	v.t.Helper()
	text, err := os.ReadFile(filepath.Join(moduleRoot(v.t), "README.md"))
	if err != nil {
		v.t.Fatal(err)
	}
	lines := regexp.MustCompile(`(?m)^    (?:\$ )?(`+pattern+`.*?)(?:  .*)?$`).FindAllSubmatch(text, -1)
	if len(lines) != 1 {
		v.t.Fatalf("README.md has %d commands %q, want one", len(lines), pattern)
	}
	return v.asks("sh", "-c", "cd; "+strings.NewReplacer(put...).Replace(string(lines[0][1])))
}

// walk is what a new user does by the README alone, with an archive at hand: install, see it work,
// break it in three ways, and find out why each time by the tools.
func (v *VM) walk(t *testing.T) {
	if err := os.WriteFile(filepath.Join(v.root, "root/service-proxy-agent-1.0.0.tgz"), release(t),
		0o600); err != nil {
		t.Fatal(err)
	}
	v.serve()
	if out, code := v.typed(`tar -xzf service-proxy-agent-VERSION`, "VERSION", "1.0.0"); code != 0 {
		t.Fatalf("the installation: exit code %d\n%s", code, out)
	}
	v.run("sh", "-c", "rm -r /root/service-proxy-agent*")
	if out, code := v.typed(`service-proxy-agent wait `); code != 0 ||
		!strings.Contains(out, "intercepting") {
		t.Fatalf("status: exit code %d\n%s", code, out)
	}
	v.says(t, 0, []string{"is intercepted", "service web"}, explainCommand, "10.10.0.1:80", vip.String())
	v.says(t, 0, nil, diffCommand)
	v.says(t, 0, nil, doctorCommand)

	for _, broken := range []struct {
		id        symptom.ID
		how, mend func()
		explained int
		explain   string
		diff      []string
	}{
		{symptom.EnvoyDown, func() { v.run("systemctl", "stop", "service-proxy-envoy") },
			func() { v.run("systemctl", "start", "service-proxy-envoy") }, 2, "not intercepted", nil},
		{symptom.AttributeBad, func() {
			v.platform.SetAttribute("gce-service-proxy", `{"service": {"serving-ports": ["web"]}}`)
		}, func() { v.platform.SetAttribute("gce-service-proxy", usualAttribute) },
			0, "is intercepted", nil},
		{symptom.RulesDiffer, func() {
			v.run("systemctl", "stop", "service-proxy-agent")
			v.run("iptables", "-w", "-t", "nat", "-F", "SERVICE_PROXY_SERVICE_CIDRS")
		}, func() { v.run("systemctl", "start", "service-proxy-agent") }, 1, "not intercepted",
			[]string{"- -A SERVICE_PROXY_SERVICE_CIDRS -d " + vip.Addr().String() + "/32 "}},
	} {
		broken.how()
		found := v.finds(broken.id)
		v.t.Logf("%s: %s; commands %q", found.ID, found.Next, found.Commands)
		v.says(t, broken.explained, []string{broken.explain}, explainCommand, "10.10.0.1:80",
			vip.String())
		if broken.diff != nil {
			v.says(t, 1, broken.diff, diffCommand)
		}
		if found.Next == "" {
			t.Errorf("%s has no next step", found.ID)
		}
		for _, command := range found.Commands {
			// The box has no editor and no gcloud.
			if out, code := v.asks("sh", "-c", command); code == 127 &&
				!strings.HasPrefix(command, "gcloud ") && !strings.Contains(command, "EDITOR") {
				t.Errorf("%s: %s: %s", found.ID, command, out)
			}
		}
		broken.mend()
		v.eventually(60*time.Second, "well again", func() error {
			if out, code := v.typed(doctorCommand); code != 0 {
				return fmt.Errorf("exit code %d\n%s", code, out)
			}
			return v.checkVIP()
		})
	}
}

// The README's commands.
const (
	doctorCommand  = `sudo service-proxy-agent doctor\b`
	explainCommand = `sudo service-proxy-agent explain 10\.10\.0\.1:80`
	diffCommand    = `sudo service-proxy-agent diff\b`
)

// says checks what the README's command answers.
func (v *VM) says(t *testing.T, code int, want []string, pattern string, put ...string) {
	t.Helper()
	out, have := v.typed(pattern, put...)
	if have != code {
		t.Errorf("%s: exit code %d, want %d\n%s", pattern, have, code, out)
	}
	for _, text := range want {
		if !strings.Contains(out, text) {
			t.Errorf("%s does not say %q:\n%s", pattern, text, out)
		}
	}
}

// finds waits until the README's doctor names what is wrong, and returns its finding.
func (v *VM) finds(id symptom.ID) (found symptom.Finding) {
	v.t.Helper()
	v.eventually(60*time.Second, "doctor finds "+string(id), func() error {
		text, code := v.typed(doctorCommand)
		if code != 1 || !strings.Contains(text, " "+string(id)+": ") {
			return fmt.Errorf("exit code %d\n%s", code, text)
		}
		return nil
	})
	out, _ := v.asks("service-proxy-agent", "doctor", "-o", "json")
	var report struct{ Findings []symptom.Finding }
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		v.t.Fatalf("%v: %s", err, out)
	}
	for _, f := range report.Findings {
		if f.ID == id {
			return f
		}
	}
	v.t.Fatalf("not in JSON: %s", out)
	return found
}
