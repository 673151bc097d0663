package config

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v2"
)

// A secret is not shown, however it is printed.
func TestSecretsAreHidden(t *testing.T) {
	l := LiveKit{APISecret: goodSecret}
	var shown []string
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		shown = append(shown, fmt.Sprintf(verb, l.APISecret), fmt.Sprintf(verb, l), fmt.Sprintf(verb, &l))
	}
	for _, encode := range []func(any) ([]byte, error){json.Marshal, yaml.Marshal} {
		data, err := encode(l)
		require.NoError(t, err)
		shown = append(shown, string(data))
	}
	for _, text := range shown {
		require.Contains(t, text, "…")
		require.NotContains(t, text, goodSecret)
		require.NotContains(t, strings.ToLower(text), fmt.Sprintf("%x", goodSecret))
	}
}

// A key and a secret can be in files, of which the first line counts. An error names the file and does not show what is in it.
func TestKeysInFiles(t *testing.T) {
	defer logrus.StandardLogger().ReplaceHooks(logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{}))
	hook := logtest.NewGlobal()
	file := func(content string, mode os.FileMode) string {
		name := filepath.Join(t.TempDir(), "file")
		require.NoError(t, os.WriteFile(name, []byte(content), mode))
		require.NoError(t, os.Chmod(name, mode))
		return name
	}
	secret := func(name string) (*Config, error) {
		return loaded(t, liveKit(map[string]string{"api_secret": "", "api_secret_file": name}))
	}
	c, err := loaded(t, liveKit(map[string]string{
		"api_key": "", "api_key_file": file(" key \r\n", 0o640), "api_secret": "", "api_secret_file": file(goodSecret+"\nmore\n", 0o600),
	}))
	require.NoError(t, err)
	require.Equal(t, "key", c.MatrixRTC.LiveKit.APIKey)
	require.EqualValues(t, goodSecret, c.MatrixRTC.LiveKit.APISecret)
	require.Empty(t, hook.AllEntries())

	name := file(goodSecret, 0o644)
	_, err = secret(name)
	require.NoError(t, err)
	require.Len(t, hook.AllEntries(), 1)
	require.Equal(t, logrus.WarnLevel, hook.LastEntry().Level)
	require.Contains(t, hook.LastEntry().Message, "chmod o-r "+name)

	for content, want := range map[string]string{
		"":             "the value is too short (must have at least 32 bytes)",
		"\n":           "the value is too short (must have at least 32 bytes)",
		"short secret": "the value is too short (must have at least 32 bytes)",
		"change-me-change-me-change-me-change-me": "the value is still the placeholder",
		strings.Repeat("x", maxKeyFile+1):         "larger than 4096 bytes",
	} {
		name := file(content, 0o600)
		_, err := secret(name)
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, `"matrix_rtc.livekit.api_secret_file"`)
		require.ErrorContains(t, err, name)
		if strings.TrimSpace(content) != "" {
			require.NotContains(t, err.Error(), content)
		}
	}
	_, err = secret(filepath.Join(t.TempDir(), "none"))
	require.ErrorContains(t, err, "no such file")
}
