package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/service-proxy-agent/service-proxy-agent/agent"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/exitcode"
)

// from is the name of the flag by which a command answers by what was seen elsewhere.
const from = "from"

// fromFlag gives a command that looks at the VM the flag --from. looked looks, or replays the file.
func fromFlag(c *cobra.Command, look func(context.Context, agent.Settings) agent.Looked) (
	looked func(context.Context) (agent.Looked, error)) {
	settings := lookFlags(c)
	file := c.Flags().String(from, "",
		"answer by `FILE`, a bundle of this program's, instead of by a look at this VM")
	return func(ctx context.Context) (agent.Looked, error) {
		if *file != "" {
			l, err := replay(*file)
			if err != nil {
				err = &exitError{code: exitcode.NotKnown, err: fmt.Errorf("--from: %w", err)}
			}
			return l, err
		}
		s, err := settings()
		if err != nil {
			return agent.Looked{}, err
		}
		return look(ctx, s), nil
	}
}

// elsewhere says whether a command is to answer by --from. Flags that say where to look on this VM
// mean nothing then: given are those that stand on the command line.
func elsewhere(flags *pflag.FlagSet, given []string) (bool, error) {
	f := flags.Lookup(from)
	switch {
	case f == nil || !f.Changed:
		return false, nil
	case f.Value.String() == "":
		return false, usage(errors.New("--from is empty; name a bundle"))
	case len(given) > 0:
		return false, usage(fmt.Errorf("--from has all that was seen: leave out --%s",
			strings.Join(given, ", --")))
	}
	return true, nil
}

// given are the flags of the daemon that have a value.
func given(flags *pflag.FlagSet) (names []string) {
	flags.Visit(func(f *pflag.Flag) {
		if _, of := f.Annotations[ofDaemon]; of {
			names = append(names, f.Name)
		}
	})
	return names
}

// mostOfFile is more than a recording ever has.
const mostOfFile = 128 << 20

// replay reads a bundle, or the recording that was taken out of one.
func replay(path string) (agent.Looked, error) {
	data, err := recordingIn(path)
	if err != nil {
		return agent.Looked{}, err
	}
	looked, err := agent.Replay(data)
	if err != nil {
		err = fmt.Errorf("%q: %w", path, err)
	}
	return looked, err
}

func recordingIn(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, int64(len(beginOfJSON))))
	if err != nil || !bytes.Equal(data, beginOfJSON) {
		return bundle.Read(path, bundle.LookFile)
	}
	rest, err := io.ReadAll(io.LimitReader(file, mostOfFile))
	return append(data, rest...), err
}

// beginOfJSON tells a recording from an archive.
var beginOfJSON = []byte("{")
