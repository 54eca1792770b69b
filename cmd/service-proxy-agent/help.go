package main

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/internal/terminal"
)

// The groups of the list of commands. What has none is for support.
var groups = []*cobra.Group{
	{ID: "daily", Title: "To look at it:"},
	{ID: "set-up", Title: "To set it up, and what its units run:"},
	{ID: "support", Title: "For support:"},
}

var groupOf = map[string]string{
	"status": "daily", "doctor": "daily", "explain": "daily", "diff": "daily",
	"bootstrap": "set-up", "run": "set-up", "wait": "set-up", "envoy": "set-up",
	"drain": "set-up", "cleanup": "set-up",
}

// withHelp has the command and those below it answer --help in our form. Cobra's own is as wide as
// its widest line.
func withHelp(root *cobra.Command) {
	root.AddGroup(groups...)
	root.SetHelpCommandGroupID("support")
	for _, c := range root.Commands() {
		c.GroupID = "support"
		if group := groupOf[c.Name()]; group != "" {
			c.GroupID = group
		}
	}
	root.SetHelpFunc(func(c *cobra.Command, _ []string) {
		out := c.OutOrStdout()
		fmt.Fprint(out, helpText(c, terminal.For(out), terminal.Width(out)))
	})
	root.SetUsageFunc(func(c *cobra.Command) error {
		out := c.OutOrStderr()
		_, err := fmt.Fprint(out, helpText(c, terminal.For(out), terminal.Width(out)))
		return err
	})
}

// helpText is what --help says of a command.
func helpText(c *cobra.Command, style terminal.Style, width int) string {
	var b strings.Builder
	line := func(hang int, format string, args ...any) {
		b.WriteString(terminal.Wrap(fmt.Sprintf(format+"\n", args...), width, hang))
	}
	head := func(title string) { line(0, "\n%s", style.Bold(title)) }
	own, daemons := flagsOf(c)
	about := says(c)
	for i, text := range about.text {
		if i > 0 {
			b.WriteByte('\n')
		}
		line(0, "%s", text)
	}
	head("Usage:")
	line(4, "  %s", useLine(c))
	if c.HasAvailableSubCommands() {
		for _, group := range c.Groups() {
			head(group.Title)
			for _, below := range c.Commands() {
				if below.GroupID == group.ID && (below.IsAvailableCommand() || below.Name() == "help") {
					line(13, "  %-10s %s", below.Name(), below.Short)
				}
			}
		}
	}
	if c.Example != "" {
		head("Examples:")
		b.WriteString(c.Example + "\n")
	}
	if own.HasAvailableFlags() {
		head("Flags:")
		b.WriteString(own.FlagUsagesWrapped(width))
	}
	if daemons.HasAvailableFlags() {
		head("Flags that say where to look, as the daemon's do:")
		b.WriteString(daemons.FlagUsagesWrapped(width))
	}
	if len(about.exits) > 0 {
		head(about.exitTitle + ":")
		for _, e := range about.exits {
			line(6, "  %-3s %s", e.code, e.meaning)
		}
	}
	if c.HasAvailableSubCommands() {
		line(0, "\n`%s COMMAND --help` says more of a command.", c.CommandPath())
	}
	return b.String()
}

func useLine(c *cobra.Command) string {
	if c.HasAvailableSubCommands() {
		return c.Use + " COMMAND [flags]"
	}
	return c.UseLine()
}

// flagsOf are a command's flags, those apart that are the daemon's, too.
func flagsOf(c *cobra.Command) (own, daemons *pflag.FlagSet) {
	own, daemons = pflag.NewFlagSet("", 0), pflag.NewFlagSet("", 0)
	c.InitDefaultHelpFlag()
	c.Flags().Lookup("help").Usage = "say this"
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if _, of := f.Annotations[ofDaemon]; of {
			daemons.AddFlag(f)
		} else {
			own.AddFlag(f)
		}
	})
	return own, daemons
}

// said is what a command says about itself beside its flags and examples.
type said struct {
	text      []string // paragraphs
	exitTitle string   // "Exit code, the same in every form of output"
	exits     []exit
}

type exit struct{ code, meaning string }

var exitCode = regexp.MustCompile(`(?:^|; )(\d+) `)

// says reads a command's Long: paragraphs with an empty line between, of which the one that begins
// with "Exit code" is a list: "Exit code: 0 ready; 1 not in time; 64 wrong usage."
func says(c *cobra.Command) (s said) {
	long := c.Long
	if long == "" {
		long = c.Short + "."
	}
	for paragraph := range strings.SplitSeq(long, "\n\n") {
		paragraph = strings.Join(strings.Fields(paragraph), " ")
		title, list, found := strings.Cut(paragraph, ": ")
		if !found || !strings.HasPrefix(title, "Exit code") {
			s.text = append(s.text, paragraph)
			continue
		}
		s.exitTitle = title
		list = strings.TrimSuffix(list, ".")
		at := exitCode.FindAllStringSubmatchIndex(list, -1)
		for i, match := range at {
			end := len(list)
			if i+1 < len(at) {
				end = at[i+1][0]
			}
			s.exits = append(s.exits, exit{list[match[2]:match[3]], list[match[1]:end]})
		}
	}
	return s
}

// visible are the commands that are shown, by name.
func visible(root *cobra.Command) []*cobra.Command {
	return slices.DeleteFunc(slices.Clone(root.Commands()),
		func(c *cobra.Command) bool { return !c.IsAvailableCommand() })
}
