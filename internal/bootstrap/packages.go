package bootstrap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/authorities"
	"github.com/service-proxy-agent/service-proxy-agent/internal/redaction"
)

// manager is a package manager and how it is asked, without questions, to install.
type manager struct {
	program string
	repair  [][]string // after an interrupted run, a power cut for instance
	refresh []string
	install []string
}

var managers = []manager{
	{"apt-get",
		[][]string{{"dpkg", "--configure", "-a", "--force-confold"}},
		[]string{"apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2", "update"},
		[]string{"apt-get", "-qq", "-y", "-o", "DPkg::Lock::Timeout=120", "-o", "Acquire::Retries=2",
			"-o", "Dpkg::Options::=--force-confold", "--no-install-recommends", "install"}},
	{"dnf", nil, nil, []string{"dnf", "-q", "-y", "install"}},
	{"yum", nil, nil, []string{"yum", "-q", "-y", "install"}},
	{"zypper", nil, nil, []string{"zypper", "--non-interactive", "install"}},
}

// sbin is where iptables is; PATH may lack it in a startup script.
var sbin = []string{"/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"}

func (b *bootstrapper) hasProgram(name string) bool {
	for _, dir := range sbin {
		if info, err := os.Stat(b.path(filepath.Join(dir, name))); err == nil && info.Mode()&0o111 != 0 {
			return true
		}
	}
	return false
}

// missing are the packages that the image lacks. Their names are the same everywhere.
func (b *bootstrapper) missing() []string {
	var packages []string
	if !b.hasProgram("iptables") || !b.hasProgram("iptables-restore") {
		packages = append(packages, "iptables")
	}
	if authorities.File(b.Root) == "" {
		packages = append(packages, "ca-certificates")
	}
	return packages
}

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
		out, err := b.exec(ctx, 10*time.Minute, m.install[0], append(m.install[1:], packages...)...)
		if err != nil {
			return fail(fmt.Errorf("%w: %s%s", err, complaint(out), stale))
		}
		if still := b.missing(); len(still) > 0 {
			return fail(fmt.Errorf("%s installed it, and it is still not there", m.program))
		}
		return nil
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
