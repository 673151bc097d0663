package commandline

import (
	"flag"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNoArguments(t *testing.T) {
	for _, test := range []struct {
		args []string
		says string
	}{
		{nil, ""},
		{[]string{"--config", "a.yaml", "--open"}, ""},
		{[]string{"a.yaml", "--open"}, `unexpected argument "a.yaml"; flags after it would be ignored: did you mean --config?`},
		{[]string{"--open", "true", "--config", "a.yaml"}, `unexpected argument "true"; flags after it would be ignored: a switch takes its value with an equals sign, as in --switch=true`},
		{[]string{"config", "a.yaml"}, `unexpected argument "config"; flags after it would be ignored: did you mean --config?`},
		{[]string{""}, `unexpected argument ""; flags after it would be ignored: did you mean --config?`},
	} {
		flags := flag.NewFlagSet("", flag.ContinueOnError)
		flags.String("config", "", "")
		flags.Bool("open", false, "")
		require.NoError(t, flags.Parse(test.args))
		if err := NoArguments(flags, "did you mean --config?"); test.says == "" {
			require.NoError(t, err, test.args)
		} else {
			require.EqualError(t, err, test.says)
		}
	}
}
