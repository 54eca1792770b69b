package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// version and commit are stamped by the Makefile (-ldflags -X); deploy/version.sh makes them.
var (
	version = "dev"
	commit  = "unknown"
)

// release is what `version -o json` prints, which docs/version.schema.json describes; fields are
// added, never renamed.
type release struct {
	Schema   string   `json:"schema"`
	Version  string   `json:"version"`
	Commit   string   `json:"commit"`
	Go       string   `json:"go"`
	Platform string   `json:"platform"`
	Modules  []module `json:"modules"`
}

type module struct {
	Path    string `json:"path"`
	Version string `json:"version"`
	Sum     string `json:"sum"`
}

func versionCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "version",
		Short: "The version, commit, platform and Go release",
		Long: "Prints the version, commit, platform and Go release, in one line. -o json has the " +
			"modules that are linked in as well, each with its version and the sum that go.sum has.\n\n" +
			"Exit code: 0 printed; 64 wrong usage.\n\n" +
			symptom.DocsURL + "version.schema.json is the form of -o json.",
		Example: "  service-proxy-agent version\n" +
			"  service-proxy-agent version -o json",
	}
	c.Flags().StringVarP(&output, "output", "o", "text", "`FORM` of the answer: text or json")
	c.RunE = func(cmd *cobra.Command, _ []string) error {
		r := release{Schema: "service-proxy-agent/version/v1", Version: version, Commit: commit,
			Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, Modules: []module{}}
		switch output {
		case "text":
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "service-proxy-agent %s (%s) %s %s\n", r.Version,
				r.Commit, r.Platform, r.Go)
			return err
		case "json":
			if info, ok := debug.ReadBuildInfo(); ok {
				r.Modules = linked(info)
			}
			e := json.NewEncoder(cmd.OutOrStdout())
			e.SetIndent("", "  ")
			return e.Encode(r)
		}
		return usage(fmt.Errorf("--output is %q; use text or json", output))
	}
	return c
}

// linked are the modules that a binary was built of. Of a replaced one that is the replacement; a
// folder in its place has no version and no sum.
func linked(info *debug.BuildInfo) []module {
	all := make([]module, 0, len(info.Deps))
	for _, d := range info.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		all = append(all, module{Path: d.Path, Version: d.Version, Sum: d.Sum})
	}
	return all
}
