//go:build lab

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
)

// bundled makes a bundle on the VM and returns where it is.
func bundled(t *testing.T, a *mesh.Agent) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "bundle.tgz")
	out, stderr, code, err := a.RunAs(t.Context(), 0, a.Settings(), "bundle", "-f", path)
	must(t, err)
	if code != 0 {
		t.Fatalf("bundle: exit code %d\n%s%s", code, out, stderr)
	}
	return path
}

// fileOf is a file of a bundle.
func fileOf(t *testing.T, path, name string) string {
	t.Helper()
	data, err := bundle.Read(path, name)
	must(t, err)
	return string(data)
}

// fromHere runs the program beside the VM, where nothing of the VM is.
func fromHere(ctx context.Context, t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	binary, err := mesh.Binary()
	must(t, err)
	var out, errs strings.Builder
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Env, cmd.Dir = []string{"PATH=/nowhere"}, t.TempDir()
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// replays has a bundle made while the symptom stands: elsewhere doctor says of it what it said
// here, of the same look.
func (p *patient) replays(t *testing.T, i injection) {
	t.Helper()
	path := bundled(t, p.a)
	inText, inJSON := fileOf(t, path, "doctor.txt"), fileOf(t, path, "doctor.json")
	var said struct {
		Exit   int
		Checks []symptom.Result
	}
	must(t, json.Unmarshal([]byte(inJSON), &said))
	for _, form := range []struct {
		name, want string
		mask       func([]byte) ([]byte, error) // as the bundle masks it
	}{{"text", inText, bundle.Lines}, {"json", inJSON, bundle.Told}} {
		full, stderr, code := fromHere(t.Context(), t, "doctor", "--from", path, "-o", form.name)
		masked, err := form.mask([]byte(full))
		must(t, err)
		out, want := string(masked), form.want
		if out != want || code != said.Exit || stderr != "" {
			t.Errorf("elsewhere, -o %s: exit code %d, on the VM %d, %q:\n%s\non the VM:\n%s", form.name, code,
				said.Exit, stderr, out, want)
		}
	}
	if *record {
		file := filepath.Join(looksDir, i.look())
		must(t, os.WriteFile(file+".json", []byte(fileOf(t, path, bundle.LookFile)), 0o644))
		must(t, os.WriteFile(file+".txt", fmt.Appendf(nil, "%sexit code %d\n", inText, said.Exit), 0o644))
	}
}

// looksDir has a look at each symptom, which a unit test of the command replays.
const looksDir = "../../cmd/service-proxy-agent/testdata/looks"

// look is the name of the symptom's files there.
func (i injection) look() string {
	how := notInName.ReplaceAllString(strings.ToLower(i.how), "-")
	return fmt.Sprintf("%02d_%s_%s", i.row, i.id, strings.Trim(how, "-"))
}

var notInName = regexp.MustCompile(`[^a-z0-9]+`)

// TestEachSymptomHasALook: each symptom is replayed, and none that is not made any more.
func TestEachSymptomHasALook(t *testing.T) {
	var want []string
	for _, s := range situations {
		for _, i := range s.injections {
			if i.told != answers {
				want = append(want, i.look()+".json", i.look()+".txt")
			}
		}
	}
	files, err := os.ReadDir(looksDir)
	must(t, err)
	var have []string
	for _, file := range files {
		have = append(have, file.Name())
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, have); diff != "" {
		t.Errorf("%s\nrun: go test -tags lab -run 'TestSymptoms$' ./test/e2e -record", diff)
	}
}

// explainedElsewhere holds explain of a bundle against explain on the VM, while nothing connects.
func explainedElsewhere(t *testing.T, m *mesh.Mesh, a *mesh.Agent, questions ...string) {
	t.Helper()
	path := bundled(t, a)
	for _, question := range questions {
		args := append(strings.Fields("explain -o json "+question), "--proxy-user",
			fmt.Sprint(lab.EnvoyUID), "--envoy-log", m.Envoy.LogPath)
		here, _, hereCode, err := a.Run(t.Context(), args...)
		must(t, err)
		args = append(strings.Fields("explain -o json "+question), "--from", path)
		there, stderr, code := fromHere(t.Context(), t, args...)
		here, there = countersTold(t, here), countersTold(t, there)
		if here != there || code != hereCode {
			t.Errorf("%s: elsewhere exit code %d, on the VM %d: %s\n%s\non the VM:\n%s", question, code,
				hereCode, stderr, there, here)
		}
	}
}

// countersTold is an answer whose counters say only that they are known, but for those of services'
// rows: a look connects to Envoy and to the metadata server itself.
func countersTold(t *testing.T, answer string) string {
	t.Helper()
	var all map[string]any
	if err := json.Unmarshal([]byte(answer), &all); err != nil {
		t.Fatalf("%v: %q", err, answer)
	}
	path, _ := all["path"].([]any)
	for _, step := range path {
		one, ok := step.(map[string]any)
		if !ok || strings.HasPrefix(fmt.Sprint(one["chain"]), "SERVICE_PROXY_SERVICE_") {
			continue
		}
		for _, name := range []string{"packets", "bytes"} {
			if _, known := one[name]; known {
				one[name] = "known"
			}
		}
	}
	text, err := json.MarshalIndent(all, "", " ")
	must(t, err)
	return string(text)
}
