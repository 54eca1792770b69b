package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
	"github.com/service-proxy-agent/service-proxy-agent/internal/system"
)

// manager is a package manager and how it is asked, without questions, to install.
type manager struct {
	program string
	repair  [][]string // after an interrupted run, a power cut for instance
	refresh []string
	install []string
}

// managers are system.Managers, and how each is used. dnf and yum look at the age of their index by
// themselves, zypper refreshes it.
var managers = []manager{
	{"apt-get",
		[][]string{{"dpkg", "--configure", "-a", "--force-confold"}},
		[]string{"apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2", "update"},
		[]string{"apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2",
			"-o", "Dpkg::Options::=--force-confold", "--no-install-recommends", "install"}},
	{"dnf", nil, nil, []string{"dnf", "-q", "-y", "--setopt=install_weak_deps=False", "install"}},
	{"yum", nil, nil, []string{"yum", "-q", "-y", "install"}},
	{"zypper", nil, nil,
		[]string{"zypper", "--quiet", "--non-interactive", "install", "--no-recommends"}},
}

func (b *bootstrapper) hasProgram(name string) bool { return system.HasProgram(b.Root, name) }

// missing are the packages that the image lacks.
func (b *bootstrapper) missing() []string { return system.MissingPackages(b.Root) }

// installPackages installs iptables and the CA certificates where the image lacks them. Debian 12
// has iptables as optional only.
func (b *bootstrapper) installPackages(ctx context.Context) error {
	packages := b.missing()
	if len(packages) == 0 {
		return nil
	}
	names := strings.Join(packages, " and ")
	fail := func(err error) error {
		return &Failure{Err: fmt.Errorf("%s missing on this image: %w", names, err),
			Advice: "mend the image's package repositories, or use an image with " + names}
	}
	for _, m := range managers {
		if !b.hasProgram(m.program) {
			continue
		}
		b.say("INFO", "installing "+names+" with "+m.program)
		for _, repair := range m.repair {
			if out, err := b.exec(ctx, 5*time.Minute, repair[0], repair[1:]...); err != nil {
				return fail(fmt.Errorf("%w: %s", err, complaint(out)))
			}
		}
		stale := ""
		if m.refresh != nil {
			// Goes on when it fails: an index of yesterday, or of the one repository that answers, may do.
			if out, err := b.exec(ctx, 5*time.Minute, m.refresh[0], m.refresh[1:]...); err != nil {
				stale = "; update: " + complaint(out)
			}
		}
		out, err := b.exec(ctx, 10*time.Minute, m.install[0], slices.Concat(m.install[1:], packages)...)
		// zypper's exit code is not 0, too, when it has installed all and has more to say: that a
		// repository was skipped (106), or a reboot is advised (102).
		switch still := b.missing(); {
		case len(still) == 0:
			return nil
		case err != nil:
			return fail(fmt.Errorf("%w: %s%s", err, complaint(out), stale))
		}
		return fail(fmt.Errorf("%s installed it, and it is still not there", m.program))
	}
	return fail(errors.New("no package manager found (apt-get, dnf, yum, zypper)"))
}

// complaint is what may be told of the package manager's own words: its first two error lines, else
// its last line. The URL of a private repository holds a password.
func complaint(out string) string {
	var errs []string
	last := ""
	for line := range strings.Lines(out) {
		line = redaction.Text(line)
		if line == "" {
			continue
		}
		last = line
		for _, prefix := range []string{"E:", "Error", "error:", "dpkg: error", "Problem:"} {
			if strings.HasPrefix(line, prefix) && len(errs) < 2 {
				errs = append(errs, line)
				break
			}
		}
	}
	if len(errs) > 0 {
		return strings.Join(errs, " ")
	}
	return last
}
