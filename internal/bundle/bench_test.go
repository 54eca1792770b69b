package bundle

import (
	"bytes"
	"os"
	"testing"
)

func BenchmarkConfig(b *testing.B) {
	in, err := os.ReadFile("testdata/config.json")
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		if _, err := Config(in); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLines(b *testing.B) {
	in := bytes.Repeat([]byte("[5:300] -A SERVICE_PROXY_B4_0A200000_12 -d 10.32.0.1/32 -m comment --comment \"service 5\" -j SERVICE_PROXY_REDIRECT\n"), 1000)
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		_, _ = Lines(in)
	}
}
