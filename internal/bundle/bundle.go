// Package bundle is the archive that support asks for: what this VM, its Envoy and its rules were
// at one moment, redacted, with a manifest that names each gap.
//
// It writes and reads the archive, and takes out of Envoy's configuration and of text what must not
// leave the VM. What goes in is gathered by package agent.
package bundle

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"time"
)

// Schema names the form of manifest.json, docs/bundle.schema.json. Fields may be added to it.
const Schema = "service-proxy-agent/bundle/v1"

const (
	// ManifestFile says what is in the bundle and what is not. It is the first file.
	ManifestFile = "manifest.json"
	// LookFile is what `doctor --from` and `explain --from` read.
	LookFile = "look.json"
)

// Gap is something that a bundle lacks, or has in part, and why.
type Gap struct {
	Name string `json:"name"` // of the file, or of what of it
	Why  string `json:"why"`
}

// File is one file of a bundle.
type File struct {
	Name   string `json:"name"`
	Source string `json:"source"` // the command, path or question whose answer it is
	Bytes  int    `json:"bytes"`
	// Cut says what is missing of it, at which end; "": nothing.
	Cut string `json:"cut,omitempty"`
	// Redacted says by which rules secrets were taken out: see docs/bundle.md.
	Redacted string `json:"redacted"`
	Data     []byte `json:"-"`
}

// Manifest is manifest.json.
type Manifest struct {
	Schema   string    `json:"schema"`
	Version  string    `json:"version"` // of the agent whose command made the bundle
	Time     time.Time `json:"time"`    // UTC
	Host     string    `json:"host"`
	Instance string    `json:"instance"` // by the metadata server; "" where it does not tell
	Kernel   string    `json:"kernel"`
	User     int       `json:"uid"`   // who made it: another than root sees less
	Files    []File    `json:"files"` // without the manifest
	Gaps     []Gap     `json:"gaps"`
}

// Write writes the bundle: m and the files that it names, in one folder of that name.
func Write(to io.Writer, folder string, m Manifest) error {
	m.Schema, m.Time = Schema, m.Time.UTC()
	m.Files, m.Gaps = append([]File{}, m.Files...), append([]Gap{}, m.Gaps...) // lists are never null
	for i := range m.Files {
		m.Files[i].Bytes = len(m.Files[i].Data)
	}
	manifest, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("make the manifest: %w", err)
	}
	zip := gzip.NewWriter(to)
	archive := tar.NewWriter(zip)
	all := append([]File{{Name: ManifestFile, Data: append(manifest, '\n')}}, m.Files...)
	for _, f := range all {
		header := tar.Header{Typeflag: tar.TypeReg, Name: folder + "/" + f.Name, Mode: 0o600,
			Size: int64(len(f.Data)), ModTime: m.Time.Truncate(time.Second)}
		if err := archive.WriteHeader(&header); err != nil {
			return fmt.Errorf("write %s: %w", f.Name, err)
		}
		if _, err := archive.Write(f.Data); err != nil {
			return fmt.Errorf("write %s: %w", f.Name, err)
		}
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return zip.Close()
}
