//go:build lab

package facts

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestShown types what the page shows, and demands the answers that it has: each fact in a shell of
// its own namespaces, as a reader has it. What an iptables of another version or a kernel words in
// another way fails here: the page says of what it was seen.
func TestShown(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("needs root: it makes namespaces")
	}
	envoy, err := filepath.Abs(os.Getenv("ENVOY"))
	if err != nil || os.Getenv("ENVOY") == "" {
		t.Fatalf("needs ENVOY, the path of an Envoy (%v)", err)
	}
	for _, f := range facts(t) {
		if len(f.Shown) == 0 || f.NotRun {
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			t.Parallel()
			answers := typed(t, envoy, f.Shown)
			for i, c := range f.Shown {
				if !c.Matches(answers[i]) {
					t.Errorf("# %s\n%s\nthe page has:\n%s", c.Typed, strings.Join(answers[i], "\n"),
						strings.Join(c.Expected, "\n"))
				}
			}
		})
	}
}

// typed runs the commands in one shell, and returns the lines that each of them printed.
func typed(t *testing.T, envoy string, commands []Command) [][]string {
	t.Helper()
	const mark = "=== command "
	script := "source docs/design/facts.sh\n"
	for i, c := range commands {
		script += "echo '" + mark + strconv.Itoa(i) + "'\n" + c.Typed + "\n"
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	// In a file, so that no program which it starts reads the rest of it.
	file := filepath.Join(t.TempDir(), "commands")
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(ctx, "unshare", "--net", "--mount", "--pid", "--fork", "--kill-child",
		"--mount-proc", "bash", file)
	cmd.Dir, cmd.WaitDelay = root, time.Second
	cmd.Env = append(os.Environ(), "ENVOY="+envoy, "LC_ALL=C")
	out, _ := cmd.CombinedOutput() // how it ends is the last command's
	if ctx.Err() != nil {
		t.Fatalf("it did not end within a minute:\n%s", out)
	}
	answers := make([][]string, len(commands))
	at := -1
	for line := range strings.Lines(string(out)) {
		line = strings.TrimRight(line, "\n")
		if number, ok := strings.CutPrefix(line, mark); ok {
			at, _ = strconv.Atoi(number)
		} else if at >= 0 {
			answers[at] = append(answers[at], line)
		}
	}
	if at != len(commands)-1 {
		t.Fatalf("it ended at command %d of %d:\n%s", at+1, len(commands), out)
	}
	return answers
}
