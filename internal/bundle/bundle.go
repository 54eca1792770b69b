// Package bundle is the archive that support asks for: what this VM, its Envoy and its rules were
// at one moment, redacted, with a manifest that names each gap.
package bundle

// Schema names the form of manifest.json, docs/bundle.schema.json.
const Schema = "service-proxy-agent/bundle/v1"

// LookFile is what `doctor --from` and `explain --from` read.
const LookFile = "look.json"

// Gap is something that a bundle lacks, or has in part, and why.
type Gap struct {
	Name string `json:"name"` // of the file, or of what of it
	Why  string `json:"why"`
}
