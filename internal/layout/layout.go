// Package layout is where the files of a release are on a VM: beneath /usr/local, where the archive
// puts them, or beneath /usr, where the packages of a distribution do. Which of the two holds for a
// program is decided when it is linked, by one word:
//
//	go build -ldflags '-X …/service-proxy-agent/internal/layout.of=packages'
//
// What bootstrap writes on a VM by itself is in the same places either way: Envoy, what it keeps of
// upgrades, configuration, state and logs. A package owns none of that.
package layout

import (
	"fmt"
	"strings"
)

// What bootstrap writes, whichever way the agent came.
const (
	Envoy   = "/usr/local/bin/envoy"
	KeptDir = "/usr/local/lib/service-proxy-agent"
)

// Layout is where the files of a release are. All are absolute.
type Layout struct {
	// Packaged: the package manager owns them. The program writes and removes none of them.
	Packaged bool

	Agent         string // the program
	ArchivedEnvoy string // the Envoy that came with the release, which bootstrap installs
	UnitDir       string // systemd's folders
	TmpfilesDir   string
	SysusersDir   string
	CatalogDir    string
	ShareDir      string // for the manual and what completes command lines
}

// Both. Systemd reads the archive's folders first: of two units of one name the archive's counts.
var (
	Archive  = beneath("/usr/local")
	Packages = beneath("/usr")
)

func beneath(prefix string) Layout {
	l := Layout{
		Packaged:      prefix == "/usr",
		Agent:         prefix + "/bin/service-proxy-agent",
		ArchivedEnvoy: KeptDir + "/archive/envoy",
		UnitDir:       prefix + "/lib/systemd/system",
		TmpfilesDir:   prefix + "/lib/tmpfiles.d",
		SysusersDir:   prefix + "/lib/sysusers.d",
		CatalogDir:    prefix + "/lib/systemd/catalog",
		ShareDir:      prefix + "/share",
	}
	if l.Packaged {
		l.ArchivedEnvoy = prefix + "/lib/service-proxy-agent/envoy"
	}
	return l
}

// of is the linker's word: nothing, or "packages".
var of string

// Here is this program's own.
var Here = choose(of)

func choose(of string) Layout {
	switch of {
	case "":
		return Archive
	case "packages":
		return Packages
	}
	panic(fmt.Sprintf("this program was linked for a layout %q, which there is not", of))
}

// Text is a text that names files of the archive (a unit, a page of the manual, in which hyphens
// are escaped) as it is in this layout.
func (l Layout) Text(text string) string {
	if l == Archive {
		return text
	}
	var pairs []string
	for _, pair := range [][2]string{
		{Archive.Agent, l.Agent}, {Archive.UnitDir, l.UnitDir}, {Archive.ShareDir, l.ShareDir},
	} {
		escape := func(s string) string { return strings.ReplaceAll(s, "-", `\-`) }
		pairs = append(pairs, pair[0], pair[1])
		if escape(pair[0]) != pair[0] {
			pairs = append(pairs, escape(pair[0]), escape(pair[1]))
		}
	}
	return strings.NewReplacer(pairs...).Replace(text)
}
