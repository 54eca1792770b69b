package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

var updateLooks = flag.Bool("update-looks", false,
	"write what doctor says of the looks in testdata anew; the looks stay")

// looksFile has a look at each symptom of TestSymptoms of test/e2e, which writes it by -record: of
// each a folder with the recording, and with what doctor said of it on the VM.
const looksFile = "testdata/looks.tar.gz"

func readLooks(t *testing.T) (files map[string]string) {
	t.Helper()
	f, err := os.Open(looksFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files = map[string]string{}
	for archive := tar.NewReader(zip); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		files[header.Name] = string(data)
	}
}

func writeLooks(t *testing.T, files map[string]string) {
	t.Helper()
	var b bytes.Buffer
	zip := gzip.NewWriter(&b)
	archive := tar.NewWriter(zip)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		header := tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name]))}
		if err := archive.WriteHeader(&header); err != nil {
			t.Fatal(err)
		}
		if _, err := archive.Write([]byte(files[name])); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(archive.Close(), zip.Close()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(looksFile, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
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
	files := readLooks(t)
	var replayed []symptom.ID
	for _, name := range slices.Sorted(maps.Keys(files)) {
		dir := path.Dir(name)
		if path.Base(name) != bundle.LookFile {
			continue
		}
		look := filepath.Join(t.TempDir(), bundle.LookFile)
		if err := os.WriteFile(look, []byte(files[name]), 0o600); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(files[name], "s3cr3t") { // of a header, by test/e2e
			t.Errorf("%s holds a secret", name)
		}
		text, code := answered(t, bundle.Lines, "doctor", "--from", look)
		inJSON, jsonCode := answered(t, bundle.Told, "doctor", "--from", look, "-o", "json")
		if *updateLooks {
			files[dir+"/doctor.txt"], files[dir+"/doctor.json"] = text, inJSON
		}
		var was struct {
			Exit   int
			Checks []symptom.Result
		}
		if err := json.Unmarshal([]byte(files[dir+"/doctor.json"]), &was); err != nil {
			t.Fatalf("%s: %v", dir, err)
		}
		if text != files[dir+"/doctor.txt"] || inJSON != files[dir+"/doctor.json"] {
			t.Errorf("%s:\n%s\non the VM it was\n%s", dir, text, files[dir+"/doctor.txt"])
		}
		if code != was.Exit || jsonCode != was.Exit {
			t.Errorf("%s: exit code %d, and %d with JSON, want %d", dir, code, jsonCode, was.Exit)
		}
		id := symptom.ID(strings.Fields(dir)[1])
		if !slices.ContainsFunc(was.Checks, func(r symptom.Result) bool {
			return r.ID == id && r.State == symptom.Found
		}) {
			t.Errorf("%s: it was not found", dir)
		}
		replayed = append(replayed, id)
	}
	slices.Sort(replayed)
	if ids := slices.Compact(slices.Clone(replayed)); len(replayed) < 45 || len(ids) < 40 {
		t.Errorf("%d looks at %d kinds of symptoms; they were more", len(replayed), len(ids))
	}
	if *updateLooks {
		writeLooks(t, files)
	}
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
		{"doctor --from", exitUsage, ""},
		{"doctor --from=", exitUsage, "--from is empty"},
		{"doctor --envoy-admin 127.0.0.1:1 --config none --from " + none, exitUsage,
			"leave out --config, --envoy-admin"},
		{"doctor --from " + none, exitNoAnswer, "no such file"},
		{"doctor --from " + folder, exitNoAnswer, "folder"},
		{"doctor --from " + text, exitNoAnswer, agent.ErrRecording.Error()},
		{"explain 10.0.0.1:80 --from " + none, exitNoAnswer, "no such file"},
		{"explain 10.0.0.1:80 --try --from " + none, exitUsage, "--try makes a connection on this machine"},
		{"explain 10.0.0.1:80 --proxy-user envoy --from " + none, exitUsage, "leave out --proxy-user"},
		{"diff --from " + none, exitUsage, "unknown flag"},
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
	files := readLooks(t)
	for name, text := range files {
		if path.Base(name) != bundle.LookFile {
			continue
		}
		look := filepath.Join(t.TempDir(), bundle.LookFile)
		if err := os.WriteFile(look, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		root := rootCommand()
		root.SetArgs([]string{"explain", "10.10.0.1:81", "--uid", "daemon", "--from", look})
		if err := root.ExecuteContext(t.Context()); !errors.Is(err, agent.ErrSettings) ||
			!strings.Contains(err.Error(), `user "daemon" is not in the recording`) {
			t.Errorf("%v", err)
		}
		return
	}
}
