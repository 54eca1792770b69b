package gather

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
)

// programs runs programs that show how the VM is.
type programs struct {
	root string // before an absolute path
	path string // folders, with colons between
}

// sbin are the folders that an ordinary user's PATH may lack.
const sbin = ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"

// waitDelay is how long the pipes of a command that has ended may stay open, and how long a busy
// machine may take to read what is in them.
const waitDelay = 2 * time.Second

func (p programs) find(name string) (string, error) {
	folders := filepath.SplitList(p.path)
	if filepath.IsAbs(name) {
		folders = []string{p.root + "/"}
	}
	for _, dir := range folders {
		if found, err := exec.LookPath(filepath.Join(dir, name)); err == nil && filepath.IsAbs(found) {
			return found, nil
		}
	}
	return "", fmt.Errorf("there is no program %s", name)
}

// run runs one command and keeps most bytes of what it writes: the first, or where last is set the
// last. A command that fails has an answer, too, if it wrote something.
func (p programs) run(ctx context.Context, most int, last bool, argv ...string) (Answer, error) {
	program, err := p.find(argv[0])
	if err != nil {
		return Answer{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, argv[1:]...)
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC", "PATH=" + p.path, "SYSTEMD_COLORS=0", "PAGER=cat"}
	cmd.Dir = "/"
	cmd.WaitDelay = waitDelay
	out := &kept{most: most, last: last}
	if !last {
		out.full = cancel // what comes after is of no use
	}
	stderr := &kept{most: 4096}
	cmd.Stdout, cmd.Stderr = out, stderr
	err = cmd.Run()
	answer := out.answer()
	said := firstLine(stderr.data)
	switch {
	case answer.Cut != "":
		err = nil
	case ctx.Err() != nil:
		answer.Cut = "its end: the command did not end in time"
		err = ctx.Err()
	case needsRoot.MatchString(said):
		err = fmt.Errorf("%s: %w: %s", argv[0], errRoot, said)
	case err != nil && said != "":
		err = fmt.Errorf("%s: %w: %s", argv[0], err, said)
	case err != nil:
		err = fmt.Errorf("%s: %w", argv[0], err)
	}
	return answer, err
}

// needsRoot are the words of iptables, nft and journalctl for who may not see all.
var needsRoot = regexp.MustCompile(`(?i)permission denied|operation not permitted|must be root|` +
	`you are currently not seeing messages`)

// each runs several commands for one file, with a line before each that says which.
func (p programs) each(most int, commands ...string) func(context.Context) (Answer, error) {
	return func(ctx context.Context) (all Answer, err error) {
		var out bytes.Buffer
		for _, command := range commands {
			one, err := p.run(ctx, most, false, strings.Fields(command)...)
			fmt.Fprintf(&out, "$ %s\n%s", command, one.Data)
			if n := len(one.Data); n > 0 && one.Data[n-1] != '\n' {
				out.WriteByte('\n')
			}
			if err != nil {
				all.Gaps = append(all.Gaps, bundle.Gap{Name: command, Why: whyNot(err)})
			}
			if one.Cut != "" {
				all.Cut = fmt.Sprintf("of %q %s", command, one.Cut)
			}
		}
		all.Data = out.Bytes()
		return all, nil
	}
}

// whole is one command, of whose answer the beginning is kept.
func (p programs) whole(most int, command string) func(context.Context) (Answer, error) {
	return func(ctx context.Context) (Answer, error) {
		return p.run(ctx, most, false, strings.Fields(command)...)
	}
}

// end is one command, of whose answer the end is kept.
func (p programs) end(most int, command string) func(context.Context) (Answer, error) {
	return func(ctx context.Context) (Answer, error) {
		return p.run(ctx, most, true, strings.Fields(command)...)
	}
}

// legacy is what is in the tables of iptables' other backend. It asks for none that is not there:
// the kernel would make it. Without -t the program goes by the same list.
func (p programs) legacy(root string, most int, six bool) func(context.Context) (Answer, error) {
	names, program := root+"/proc/net/ip_tables_names", "iptables"
	if six {
		names, program = root+"/proc/net/ip6_tables_names", "ip6tables"
	}
	return func(ctx context.Context) (Answer, error) {
		list, err := os.ReadFile(names)
		if errors.Is(err, os.ErrNotExist) || err == nil && len(bytes.TrimSpace(list)) == 0 {
			return Answer{}, errAbsent
		}
		if err != nil {
			return Answer{}, err
		}
		used, _ := p.find(program + "-save")
		other, err := p.find(program + "-legacy-save")
		if err != nil {
			return Answer{}, err
		}
		if target(used) == target(other) {
			return Answer{}, errAbsent // it is the backend in use, and has a file of its own
		}
		return p.run(ctx, most, false, program+"-legacy-save", "-c")
	}
}

func target(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	return path
}

func firstLine(text []byte) string {
	line, _, _ := strings.Cut(strings.TrimSpace(string(text)), "\n")
	return line
}

// kept keeps the first or the last bytes of what is written to it, in whole lines: half a line may
// be half of a quoted value, which nothing would tell from other text.
type kept struct {
	most int
	last bool
	full func() // called when no more is kept
	data []byte
	lost bool
}

func (k *kept) Write(b []byte) (int, error) {
	n := len(b)
	switch {
	case !k.last:
		if room := k.most - len(k.data); n > room {
			b, k.lost = b[:max(room, 0)], true
			if k.full != nil {
				k.full()
			}
		}
		k.data = append(k.data, b...)
	default:
		if k.data = append(k.data, b...); len(k.data) > 2*k.most {
			k.data = append(k.data[:0], k.data[len(k.data)-k.most-1:]...)
			k.lost = true
		}
	}
	return n, nil
}

func (k *kept) answer() Answer {
	data := k.data
	if k.last && len(data) > k.most {
		// One more: it may end the line before.
		data, k.lost = data[len(data)-k.most-1:], true
	}
	switch {
	case !k.lost:
		return Answer{Data: data}
	case k.last:
		_, data, _ = bytes.Cut(data, []byte("\n"))
		return Answer{Data: data, Cut: fmt.Sprintf("its beginning: more than %d bytes", k.most)}
	}
	data = data[:bytes.LastIndexByte(data, '\n')+1]
	return Answer{Data: data, Cut: fmt.Sprintf("its end: more than %d bytes", k.most)}
}
