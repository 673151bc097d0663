package main

import (
	"flag"
	"strings"
	"testing"
)

func TestCheckArguments(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string // "" if the command line is accepted
	}{
		{nil, ""},
		{[]string{"--config", "my.yaml", "--http-bind-address", ":1"}, ""},
		{[]string{"--tls-cert", "a", "--tls-key", "b"}, ""},
		{[]string{"my.yaml", "--http-bind-address", ":1"}, "did you mean --config my.yaml?"},
		{[]string{"."}, "did you mean --data .?"},
		{[]string{"127.0.0.1:8008"}, "did you mean --http-bind-address 127.0.0.1:8008?"},
		{[]string{"--data", ""}, "--data is empty"},
		{[]string{"--tls-cert", "a"}, "need each other"},
		{[]string{"--tls-key", "a"}, "need each other"},
	} {
		flags := flag.NewFlagSet("", flag.ContinueOnError)
		for _, name := range []string{"config", "http-bind-address", "tls-cert", "tls-key"} {
			flags.String(name, "", "")
		}
		flags.String("data", "data", "")
		if err := flags.Parse(c.args); err != nil {
			t.Fatal(err)
		}
		switch err := checkArguments(flags); {
		case c.says == "" && err != nil, c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)):
			t.Errorf("%q: %v, want %q", c.args, err, c.says)
		}
	}
}
