package main

import (
	"context"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// What a person gets who presses Tab. The shells' scripts ask for it by the hidden command
// __complete; they are in deploy/completion.

// values are the values of flags, by name, in every command.
var values = map[string]cobra.CompletionFunc{
	"cloud-logging":        fixed("auto\ton a VM whose scopes allow it", "on", "off"),
	"fail-on":              fixed("error", "warning", "advice"),
	"gid":                  one(groupNames),
	"ignore":               several(checks),
	"in-interface":         one(interfaces),
	"intercept-interfaces": several(interfaces),
	"log-level":            fixed("debug", "info", "warn", "error"),
	"proxy-user":           one(userNames),
	"resolver-users":       several(userNames),
	"uid":                  one(userNames),
	"when-envoy-down":      fixed("keep\tthe jumps stay", "bypass\tthey go until it accepts again"),
}

// withCompletion completes the values of every flag and argument: by the table above, files where
// the usage calls the value `FILE`, folders where it is `DIR`, and else nothing, where the shells
// would offer files.
func withCompletion(root *cobra.Command) {
	for _, c := range root.Commands() {
		if c.ValidArgsFunction == nil {
			c.ValidArgsFunction = cobra.NoFileCompletions
		}
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.NoOptDefVal == "" || f.Value.Type() != "bool" {
				_ = c.RegisterFlagCompletionFunc(f.Name, valuesOf(f)) // fails for a second one only
			}
		})
	}
}

func valuesOf(f *pflag.Flag) cobra.CompletionFunc {
	kind, usage := pflag.UnquoteUsage(f)
	switch {
	case values[f.Name] != nil:
		return values[f.Name]
	case f.Name == "output" && strings.Contains(usage, "text or json"):
		return fixed("text\tfor people", "json\tfor programs")
	case kind == "FILE":
		return cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault)
	case kind == "DIR":
		return cobra.FixedCompletions(nil, cobra.ShellCompDirectiveFilterDirs)
	}
	return cobra.NoFileCompletions
}

func fixed(all ...cobra.Completion) cobra.CompletionFunc {
	return one(func() []cobra.Completion { return all })
}

// one completes a value that is one of a list.
func one(list func() []cobra.Completion) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, typed string) (
		fit []cobra.Completion, _ cobra.ShellCompDirective,
	) {
		for _, value := range list() {
			if strings.HasPrefix(value, typed) {
				fit = append(fit, value)
			}
		}
		return fit, cobra.ShellCompDirectiveNoFileComp
	}
}

// several completes the last of values with commas between.
func several(list func() []cobra.Completion) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, typed string) (
		fit []cobra.Completion, _ cobra.ShellCompDirective,
	) {
		at := strings.LastIndex(typed, ",") + 1
		before, last := typed[:at], typed[at:]
		for _, value := range list() {
			name, _, _ := strings.Cut(value, "\t")
			if strings.HasPrefix(value, last) && !strings.Contains(","+before, ","+name+",") {
				fit = append(fit, before+value)
			}
		}
		return fit, cobra.ShellCompDirectiveNoFileComp
	}
}

func checks() (all []cobra.Completion) {
	for _, k := range symptom.Kinds() {
		all = append(all, cobra.CompletionWithDesc(string(k.ID), k.Title))
	}
	return all
}

func interfaces() (all []cobra.Completion) {
	found, err := net.Interfaces()
	if err != nil {
		return nil
	}
	for _, i := range found {
		all = append(all, i.Name)
	}
	return all
}

func userNames() []cobra.Completion  { return names("/etc/passwd", "uid ") }
func groupNames() []cobra.Completion { return names("/etc/group", "gid ") }

// names are those of a file in which each line is NAME:x:NUMBER:...
func names(file, number string) (all []cobra.Completion) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Split(line, ":"); len(fields) > 2 && fields[0] != "" {
			all = append(all, cobra.CompletionWithDesc(fields[0],
				number+strings.TrimSpace(fields[2])))
		}
	}
	return all
}

// Limits of the addresses that are offered: a person waits, and bash takes a second for 1,000.
const (
	askLimit     = time.Second
	maxAddresses = 500
)

// addresses completes an ADDRESS:PORT with those of the daemon's services. Where the daemon does
// not tell (as without root) there are none.
func addresses(c *cobra.Command, args []string, typed string) (
	all []cobra.Completion, _ cobra.ShellCompDirective,
) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(c.Context(), askLimit)
	defer cancel()
	_, s, err := askStatus(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	for _, service := range s.Services {
		for _, address := range service.Addresses {
			// Not those of a whole range or of a port alone.
			to, err := netip.ParseAddrPort(address)
			if err != nil || !strings.HasPrefix(to.String(), typed) {
				continue
			}
			all = append(all, cobra.CompletionWithDesc(to.String(),
				symptom.Printable(service.Name, 60)))
			if len(all) == maxAddresses {
				return all, cobra.ShellCompDirectiveNoFileComp
			}
		}
	}
	return all, cobra.ShellCompDirectiveNoFileComp
}
