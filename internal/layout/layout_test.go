package layout

import (
	"strings"
	"testing"
)

// TestOne: the two layouts have no file in common, so that neither way of installing overwrites
// what the other has brought, and what bootstrap writes belongs to no package.
func TestOne(t *testing.T) {
	if Here != Archive {
		t.Errorf("a plain build is for %+v", Here)
	}
	for _, path := range []string{Packages.Agent, Packages.ArchivedEnvoy, Packages.UnitDir,
		Packages.TmpfilesDir, Packages.SysusersDir, Packages.CatalogDir, Packages.ShareDir} {
		if !strings.HasPrefix(path, "/usr/") || strings.HasPrefix(path, "/usr/local") {
			t.Errorf("a package has %s", path)
		}
	}
	for _, path := range []string{Archive.Agent, Archive.ArchivedEnvoy, Archive.UnitDir,
		Archive.TmpfilesDir, Archive.SysusersDir, Archive.CatalogDir, Archive.ShareDir, Envoy, KeptDir} {
		if !strings.HasPrefix(path, "/usr/local/") {
			t.Errorf("the archive has %s", path)
		}
	}
}

func TestChoose(t *testing.T) {
	if choose("") != Archive || choose("packages") != Packages {
		t.Error("the linker's word is not followed")
	}
	defer func() {
		if recover() == nil {
			t.Error("a misspelt word is taken")
		}
	}()
	choose("package")
}

func TestText(t *testing.T) {
	const unit = "ExecStart=/usr/local/bin/service-proxy-agent envoy -- /usr/local/bin/envoy -c x"
	if have := Archive.Text(unit); have != unit {
		t.Errorf("the archive's own: %q", have)
	}
	for text, want := range map[string]string{
		unit: "ExecStart=/usr/bin/service-proxy-agent envoy -- /usr/local/bin/envoy -c x",
		`\fI/usr/local/bin/service\-proxy\-agent\fP`: `\fI/usr/bin/service\-proxy\-agent\fP`,
		`\fI/usr/local/share\fP`:                     `\fI/usr/share\fP`,
		`/usr/local/lib/systemd/system`:              `/usr/lib/systemd/system`,
		`/usr/local/lib/service-proxy-agent`:         `/usr/local/lib/service-proxy-agent`,
	} {
		if have := Packages.Text(text); have != want {
			t.Errorf("%q becomes %q, want %q", text, have, want)
		}
	}
}
