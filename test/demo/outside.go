package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// apiPort is where the emulated Compute API listens, on the control plane's address.
const apiPort = 80

const (
	namespace = "gce-service-proxy"
	vmName    = "vm-1"
)

// you is the desk: the client's namespace with gcloud pointed at the emulator.
func (d *demo) you() (place, error) {
	config := filepath.Join(d.mesh.Dir, "gcloud")
	if err := os.MkdirAll(config, 0o700); err != nil {
		return place{}, err
	}
	// Without a log file gcloud leaves nothing of value in that folder, which goes with the lab.
	env := append(d.mesh.Platform.GcloudEnv(d.apiBase(), config, os.Getenv("PATH")),
		"CLOUDSDK_CORE_DISABLE_FILE_LOGGING=true")
	return place{prompt: "you$", in: d.mesh.Client, env: env}, nil
}

func (d *demo) apiBase() string { return fmt.Sprintf("http://%s", d.mesh.CPAddr.Addr()) }

// outside reads the guest attributes and the serial port as one who cannot log in.
func (d *demo) outside(ctx context.Context) error {
	attributes := func() map[string]string { return d.mesh.Platform.GuestAttributes(namespace) }
	const ready = "ready: Envoy "
	err := d.mesh.Platform.Wait(ctx, func() bool {
		g := attributes()
		return g["agent-heartbeat"] != "" && g["proxy-version"] != "" && g["agent-last-failure"] != "" &&
			strings.Contains(d.mesh.Platform.Serial(), ready)
	})
	if err != nil {
		return d.withLog(fmt.Errorf("the guest attributes %v and the serial port %q: %w", attributes(),
			d.mesh.Platform.Serial(), err))
	}
	at, err := d.you()
	if err != nil {
		return err
	}
	ask := d.gcloud
	if _, err := exec.LookPath("gcloud"); err != nil {
		d.tell(
			"gcloud is not on PATH, so the Compute API is asked itself, with the very calls that gcloud " +
				"makes.")
		ask = d.api
	} else {
		d.tell("gcloud takes some seconds to start.")
	}
	table, serial, err := ask(ctx, at)
	if err != nil {
		return err
	}
	now := attributes()
	at1, err := time.Parse(time.RFC3339, now["agent-heartbeat"])
	switch {
	case err != nil:
		return fmt.Errorf("agent-heartbeat is no time: %w", err)
	case time.Since(at1) > 5*time.Minute || time.Until(at1) > time.Second: // so old means stuck
		return fmt.Errorf("agent-heartbeat is %s, and it is %s", at1, time.Now().UTC())
	case now["proxy-version"] != d.version:
		return fmt.Errorf("proxy-version is %q, and Envoy is %q", now["proxy-version"], d.version)
	case !strings.Contains(now["agent-last-failure"], "rule removed") ||
		!strings.Contains(now["agent-last-failure"], "(over; "):
		return fmt.Errorf("agent-last-failure is %q, and all that happened is that a rule was removed",
			now["agent-last-failure"])
	}
	for _, key := range []string{"agent-heartbeat", "proxy-version"} {
		if table[key] == "" || key == "proxy-version" && table[key] != d.version {
			return fmt.Errorf("the answer has %q for %s, want %q", table[key], key, now[key])
		}
	}
	if !slices.ContainsFunc(serial, func(line string) bool {
		return strings.Contains(line, ready+d.version)
	}) {
		return fmt.Errorf("the serial port's output lacks %q:\n%s", ready+d.version,
			strings.Join(serial, "\n"))
	}
	d.tell("hold: no jump goes in until Envoy accepts connections; then it is intercepting.")
	d.ok("the heartbeat is fresh, the version is that of the Envoy that runs, and " +
		"agent-last-failure and the serial port tell who deleted the rule, and that this is over")
	return nil
}

// gcloud asks as a user does.
func (d *demo) gcloud(
	ctx context.Context, at place) (table map[string]string, serial []string, err error) {
	// It takes seconds to start, so both questions are asked at once, and shown one after the other.
	ctx, cancel := context.WithCancel(ctx)
	var port struct {
		out string
		err error
	}
	args := []string{"compute", "instances", "get-serial-port-output", vmName}
	second := d.silent(ctx, at, "gcloud", args...)
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		port.out, port.err = d.must(second)
	}()
	defer func() { cancel(); <-asked }()
	out, err := d.must(d.command(ctx, at, "gcloud", "compute", "instances", "get-guest-attributes",
		vmName, "--query-path="+namespace+"/"))
	if err != nil {
		return nil, nil, err
	}
	d.output(out)
	table = make(map[string]string)
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) >= 3 && f[0] == namespace {
			table[f[1]] = strings.Join(f[2:], " ")
		}
	}
	d.prompt(at.prompt, typed(append([]string{"gcloud"}, args...)))
	<-asked
	d.output(port.out)
	return table, lines(port.out), port.err
}

// api makes gcloud's calls.
func (d *demo) api(
	ctx context.Context, at place) (table map[string]string, serial []string, err error) {
	vm := d.apiBase() + "/compute/v1/projects/my-project/zones/us-central1-a/instances/" + vmName
	out, err := d.must(d.command(ctx, at, "curl", "-sS", "--max-time", "5",
		vm+"/getGuestAttributes?queryPath="+namespace+"/"))
	if err != nil {
		return nil, nil, err
	}
	var answer struct {
		QueryValue struct {
			Items []struct{ Namespace, Key, Value string }
		}
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil {
		return nil, nil, fmt.Errorf("read %q: %w", out, err)
	}
	table = make(map[string]string)
	for _, i := range answer.QueryValue.Items {
		if i.Namespace == namespace {
			table[i.Key] = i.Value
		}
	}
	d.output(indented(out))
	out, err = d.must(d.command(ctx, at, "curl", "-sS", "--max-time", "5", vm+"/serialPort?port=1"))
	if err != nil {
		return nil, nil, err
	}
	var port struct{ Contents string }
	if err := json.Unmarshal([]byte(out), &port); err != nil {
		return nil, nil, fmt.Errorf("read %q: %w", out, err)
	}
	d.tell("(its field `contents`:)")
	d.output(port.Contents)
	return table, lines(port.Contents), nil
}

func indented(text string) string {
	var v any
	if json.Unmarshal([]byte(text), &v) != nil {
		return text
	}
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return text
	}
	return string(b)
}

// must runs a command that has to succeed.
func (d *demo) must(c command) (string, error) {
	began := time.Now()
	code, out, err := c.run()
	switch {
	case err != nil:
		return out, fmt.Errorf("%s: %w after %.1f s: %s", c.name, err, time.Since(began).Seconds(),
			strings.TrimSpace(out))
	case code != 0:
		return out, fmt.Errorf("%s: exit code %d: %s", c.name, code, strings.TrimSpace(out))
	}
	return out, nil
}

func lines(text string) []string { return strings.Split(strings.TrimSpace(text), "\n") }
