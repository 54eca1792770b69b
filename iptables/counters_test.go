package iptables

import "testing"

func TestCounter(t *testing.T) {
	for _, tt := range []struct {
		name, line, rule string
		want             Counter
	}{
		{"legacy", "-A X -p tcp -c 3 180 -j Y", "-A X -p tcp -j Y", Counter{3, 180, true}},
		{"nft", "-A X -p tcp -j Y -c 3 180", "-A X -p tcp -j Y", Counter{3, 180, true}},
		{"no match", "-A X -c 0 0 -j Y", "-A X -j Y", Counter{0, 0, true}},
		{"no target", "-A X -p tcp -c 1 2", "-A X -p tcp", Counter{1, 2, true}},
		{"a comment that looks alike", `-A X -m comment --comment "a -c 1 2 b" -c 3 4 -j Y`,
			`-A X -m comment --comment "a -c 1 2 b" -j Y`, Counter{3, 4, true}},
		{"another rule", "-A X -p udp -c 3 180 -j Y", "-A X -p tcp -j Y", Counter{}},
		{"a rule that is the same but for a number", "-A X -p tcp -c 3 180 -j Y -c 1 2",
			"-A X -p tcp -j Y", Counter{}},
		{"no counters", "-A X -p tcp -j Y", "-A X -p tcp -j Y", Counter{}},
		{"cut", "-A X -p tcp -c 3", "-A X -p tcp", Counter{}},
		{"no numbers", "-A X -c -1 x", "-A X", Counter{}},
	} {
		if got := counter(tt.line, tt.rule); got != tt.want {
			t.Errorf("%s: got %+v, want %+v", tt.name, got, tt.want)
		}
	}
}
