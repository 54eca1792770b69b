package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

var updateLooks = flag.Bool("update-looks", false,
	"write what doctor says of the looks in testdata anew; the looks stay")

// looks are those at each symptom of TestSymptoms of test/e2e, which writes them by -record: of
// each the recording, ROW_ID_WHAT-WAS-DONE.json, and as .txt what doctor said of it on the VM.
func looks(t *testing.T) (files []string) {
	t.Helper()
	files, err := filepath.Glob("testdata/looks/*.json")
	if err != nil || len(files) < 45 {
		t.Fatalf("%d looks, %v; they were more", len(files), err)
	}
	return files
}

// answered runs a command, and returns its answer, as a bundle masks it, and its exit code.
func answered(t *testing.T, mask func([]byte) ([]byte, error), args ...string) (
	out string, code int) {
	t.Helper()
	var b bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&b)
	root.SetErr(io.Discard)
	err := root.ExecuteContext(t.Context())
	var exit *exitError
	if err != nil && (!errors.As(err, &exit) || exit.err != nil) {
		t.Fatalf("%q: %v", args, err)
	}
	if exit != nil {
		code = exit.code
	}
	masked, err := mask(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return string(masked), code
}

// TestRecordedSymptoms: of each symptom that was made with the real parts, doctor says by the
// recording what it said on the VM.
func TestRecordedSymptoms(t *testing.T) {
	for _, look := range looks(t) {
		said := strings.TrimSuffix(look, ".json") + ".txt"
		text, code := answered(t, bundle.Lines, "doctor", "--from", look)
		text += fmt.Sprintf("exit code %d\n", code)
		if *updateLooks {
			if err := os.WriteFile(said, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if was := read(t, said); text != was {
			t.Errorf("%s:\n%s\non the VM it was\n%s", look, text, was)
		}
		if strings.Contains(read(t, look), "s3cr3t") { // of a header, by test/e2e
			t.Errorf("%s holds a secret", look)
		}
		form, codeOfForm := answered(t, bundle.Told, "doctor", "--from", look, "-o", "json")
		schema.Valid(t, "doctor", []byte(form))
		var r doctor.Report
		if err := json.Unmarshal([]byte(form), &r); err != nil {
			t.Fatalf("%s: %v", look, err)
		}
		if r.Exit != code || codeOfForm != code {
			t.Errorf("%s: exit code %d, with JSON %d, which says %d", look, code, codeOfForm, r.Exit)
		}
		id := symptom.ID(strings.Split(filepath.Base(look), "_")[1])
		if !slices.ContainsFunc(r.Findings, func(f symptom.Finding) bool { return f.ID == id }) {
			t.Errorf("%s: it was not found", look)
		}
	}
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestFromUsage: beside --from nothing is looked at.
func TestFromUsage(t *testing.T) {
	was := daemonsFile
	defer func() { daemonsFile = was }()
	daemonsFile = filepath.Join(t.TempDir(), "service-proxy-agent")
	if err := os.WriteFile(daemonsFile, []byte("SERVICE_PROXY_AGENT_RESOLVER_USERS=\"a,\"b\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := filepath.Join(t.TempDir(), "none.tgz")
	folder := t.TempDir()
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		code int
		says string
	}{
		{"doctor --from", exitcode.Usage, ""},
		{"doctor --from=", exitcode.Usage, "--from is empty"},
		{"doctor --envoy-admin 127.0.0.1:1 --config none --from " + none, exitcode.Usage,
			"leave out --config, --envoy-admin"},
		{"doctor --from " + none, exitcode.NotKnown, "no such file"},
		{"doctor --from " + folder, exitcode.NotKnown, "folder"},
		{"doctor --from " + text, exitcode.NotKnown, agent.ErrRecording.Error()},
		{"explain 10.0.0.1:80 --from " + none, exitcode.NotKnown, "no such file"},
		{"explain 10.0.0.1:80 --try --from " + none, exitcode.Usage, "--try makes a connection on this machine"},
		{"explain 10.0.0.1:80 --proxy-user envoy --from " + none, exitcode.Usage, "leave out --proxy-user"},
		{"diff --from " + none, exitcode.Usage, "unknown flag"},
	} {
		root := rootCommand()
		root.SetArgs(strings.Fields(tt.args))
		err := root.ExecuteContext(t.Context())
		var exit *exitError
		if !errors.As(err, &exit) || exit.code != tt.code || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want exit code %d and %q", tt.args, err, tt.code, tt.says)
		}
	}
}

// TestReplayedUser: whoever the recording does not know is not looked up on this machine.
func TestReplayedUser(t *testing.T) {
	root := rootCommand()
	root.SetArgs([]string{"explain", "10.10.0.1:81", "--uid", "daemon", "--from", looks(t)[0]})
	if err := root.ExecuteContext(t.Context()); !errors.Is(err, agent.ErrSettings) ||
		!strings.Contains(err.Error(), `user "daemon" is not in the recording`) {
		t.Errorf("%v", err)
	}
}
