package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/doctor"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
	"github.com/service-proxy-agent/service-proxy-agent/internal/gather"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/page"
	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

func bundleCommand() *cobra.Command {
	var file string
	var overwrite bool
	c := &cobra.Command{
		Use:   "bundle",
		Short: "Everything that support needs, without secrets, in one .tgz",
		Long: "Asks this VM's kernel, Envoy, daemon, systemd and files what they know, takes out what " +
			"is secret,\nand writes one archive. It changes nothing else, needs no daemon, and ends " +
			"within half a minute, whatever hangs. What could not be had is named in the archive's " +
			"manifest.json and at the end. Envoy is asked for its whole configuration once: with many " +
			"thousands of services that takes its main thread some seconds in all (6 with 10,000).\n\n" +
			"Exit code: 0 the archive is written, with gaps or without; 2 it is not; 64 wrong usage.\n\n" +
			"Have `doctor --from` and `explain --from` look at it elsewhere.\n" +
			symptom.DocsURL + "bundle.schema.json is the form of manifest.json.",
		Example: "  sudo service-proxy-agent bundle\n" +
			"  sudo service-proxy-agent bundle -f bundle.tgz\n" +
			"  # From afar: -f - through ssh, and >bundle.tgz there",
	}
	settings := lookFlags(c)
	c.Flags().StringVarP(&file, "file", "f", "", "the archive `FILE`, - for stdout; default: "+
		"one in this folder named by host and time")
	c.Flags().BoolVar(&overwrite, "overwrite", false, "replace the file if it is there")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		out := cmd.OutOrStdout()
		if _, _, isTerminal := terminal.Window(out); file == "-" && isTerminal {
			return usage(errors.New("--file is -, and stdout is a terminal; name a file, or lead it to one"))
		}
		if file == "" && cmd.Flags().Changed("file") {
			return usage(errors.New("--file is empty; name a file, or - for stdout"))
		}
		s, err := settings()
		if err != nil {
			return err
		}
		if err := writeBundle(cmd.Context(), s, file, overwrite, out); err != nil {
			return &exitError{code: exitcode.NotKnown, err: fmt.Errorf("no bundle: %w", err)}
		}
		return nil
	}
	return c
}

// writeBundle makes the bundle and says on out what it is, or on stderr where out gets it.
func writeBundle(ctx context.Context, s agent.Settings, file string, overwrite bool,
	out io.Writer) error {
	host, _ := os.Hostname() // one without a name is as good
	now := time.Now().UTC()
	folder := "service-proxy-agent-bundle-" + notInNames.ReplaceAllString(host, "_") + "-" +
		now.Format("20060102T150405Z")
	if file == "" {
		file = folder + ".tgz"
	}
	to, say := out, io.Writer(os.Stderr)
	var target *bundle.Target
	if file != "-" { // before all that takes long
		var err error
		if target, err = bundle.Create(file, overwrite); err != nil {
			if errors.Is(err, bundle.ErrExists) {
				err = fmt.Errorf("%w; name another by --file, or add --overwrite", err)
			}
			return err
		}
		defer target.Discard()
		to, say = target, out
	}
	m := bundle.Manifest{Version: version, Time: now, Host: host, Kernel: kernelRelease(),
		User: os.Geteuid()}
	told := make(chan string, 1)
	go func() {
		asked, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		id, _ := metadata.ReadInstance(asked) // the attribute's gap says why not
		told <- id
	}()
	m.Files, m.Gaps = gather.Run(ctx, append(lookSources(s), gather.Sources(gatherSettings(s),
		bundle.LookFile)...))
	m.Instance = bundle.Secrets(<-told)
	size := &counted{to: to}
	if ctx.Err() != nil {
		return errors.New("interrupted; nothing was written")
	}
	if err := bundle.Write(size, folder, m); err != nil {
		return err
	}
	if target != nil {
		if err := target.Commit(); err != nil {
			return err
		}
	}
	return summary(say, file, folder, size.n, m)
}

// counted counts what is written.
type counted struct {
	to io.Writer
	n  int64
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.to.Write(b)
	c.n += int64(n)
	return n, err
}

// summary says what was written, what is missing, and what to do.
func summary(say io.Writer, file, folder string, size int64, m bundle.Manifest) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%s: %.1f MB, %d files\n", file, float64(size)/1e6, len(m.Files)+1)
	if len(m.Gaps) > 0 {
		fmt.Fprintln(&text, "not in it, or in part only:")
	}
	for _, g := range m.Gaps {
		fmt.Fprintf(&text, "  %s: %s\n", g.Name, g.Why)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(&text, "as root (sudo) it holds more")
	}
	if file != "-" {
		fmt.Fprintf(&text, "secrets were taken out; look into it before you send it:\n"+
			"  tar -tzf %[1]s\n  tar -xzOf %[1]s %[2]s/%[3]s\n", file, folder, bundle.ManifestFile)
	}
	_, err := io.WriteString(say, text.String())
	return err
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9.-]`)

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func gatherSettings(s agent.Settings) gather.Settings {
	known := []string{metadata.HostEnv, "GOGC", "GOMEMLIMIT", "GODEBUG", "GOTRACEBACK", "GOMAXPROCS"}
	runCommand().Flags().VisitAll(func(f *pflag.Flag) { known = append(known, envName(f.Name)) })
	return gather.Settings{EnvoyAdmin: s.EnvoyAdmin, EnvoyLog: s.EnvoyLog, Config: s.Config,
		StateDir: s.StateDir, Listen: s.Listen, MetricsListen: s.MetricsListen,
		Environment: daemonsFile, Known: known}
}

// lookSources are the files that are made of one look at the VM, and of the daemon's answer.
func lookSources(s agent.Settings) []gather.Source {
	var once sync.Once
	var looked agent.Looked
	look := func(ctx context.Context) agent.Looked {
		once.Do(func() { looked = agent.Look(ctx, s) })
		return looked
	}
	report := func(ctx context.Context) doctor.Report {
		return reportOf(look(ctx), symptom.Error)
	}
	data := func(b []byte, err error) (gather.Answer, error) { return gather.Answer{Data: b}, err }
	text := func(write func(io.Writer) error) (gather.Answer, error) {
		var b bytes.Buffer
		err := write(&b)
		return data(b.Bytes(), err)
	}
	const (
		limit = 12 * time.Second // a look takes nine at most
		most  = 32 << 20
	)
	return []gather.Source{
		{Name: bundle.LookFile, From: "a look at this VM", Limit: limit + 4*time.Second, Most: 3 * most,
			Mask: gather.Told, Get: func(ctx context.Context) (gather.Answer, error) {
				recorded, gaps, err := look(ctx).Record(ctx)
				return gather.Answer{Data: recorded, Gaps: gaps}, err
			}},
		{Name: "doctor.txt", From: "doctor", Limit: limit, Most: most, Mask: gather.Lines,
			Get: func(ctx context.Context) (gather.Answer, error) {
				r, err := masked(report(ctx))
				if err != nil {
					return gather.Answer{}, err
				}
				return text(func(w io.Writer) error { return r.Text(w, terminal.Style(false), 100) })
			}},
		{Name: "doctor.json", From: "doctor -o json", Limit: limit, Most: most, Mask: gather.Told,
			Get: func(ctx context.Context) (gather.Answer, error) { return data(report(ctx).JSON()) }},
		{Name: "status.json", From: "status -o json", Limit: 6 * time.Second, Most: most,
			Mask: gather.Told, Get: func(ctx context.Context) (gather.Answer, error) {
				body, _, err := askStatus(ctx)
				return data(body, err)
			}},
		{Name: "status.txt", From: "status", Limit: 6 * time.Second, Most: most, Mask: gather.Lines,
			Get: func(ctx context.Context) (gather.Answer, error) {
				_, now, err := askStatus(ctx)
				if err == nil {
					now, err = masked(now)
				}
				if err != nil {
					return gather.Answer{}, err
				}
				return text(func(w io.Writer) error {
					return now.Text(w, status.TextOptions{Now: time.Now(), Width: 100,
						History: len(now.History)})
				})
			}},
		{Name: "index.html", From: "status --html", Limit: limit + 4*time.Second, Most: most,
			Mask: gather.HTML, Get: func(ctx context.Context) (gather.Answer, error) {
				c, err := maskedContent(contentOf(ctx, look(ctx)))
				if err != nil {
					return gather.Answer{}, err
				}
				return text(func(w io.Writer) error { return page.Render(w, c) })
			}},
	}
}

// masked is a value without secrets. A text that is made of one may have a secret in pieces, a line
// each, that its own mask would not know.
func masked[T any](value T) (without T, err error) {
	text, err := json.Marshal(value)
	if err == nil {
		text, err = bundle.Told(text)
	}
	if err == nil {
		err = json.Unmarshal(text, &without)
	}
	return without, err
}

func maskedContent(c page.Content) (page.Content, error) {
	var errs [3]error
	c.Status, errs[0] = masked(c.Status)
	c.Seen, errs[1] = masked(c.Seen)
	c.Report, errs[2] = masked(c.Report)
	c.NoStatus, c.NoCounts = bundle.Secrets(c.NoStatus), bundle.Secrets(c.NoCounts)
	return c, errors.Join(errs[:]...)
}
