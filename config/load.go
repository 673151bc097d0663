package config

import (
	"errors"
	"os"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"gopkg.in/yaml.v2"
)

// Load reads our sections of dendrite.yaml. Dendrite has read the rest of the file. The error names every bad key.
func Load(file string, cfg *config.Dendrite) (*Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	c, err := parse(data)
	if err != nil {
		return nil, err
	}
	if c.MatrixRTC.LiveKit != nil {
		var errs config.ConfigErrors
		if c.MatrixRTC.LiveKit.resolve(&cfg.Global, &errs); len(errs) > 0 {
			return nil, joined(errs)
		}
	}
	return c, c.resolveDatabase(cfg)
}

func joined(errs config.ConfigErrors) error { return errors.New(strings.Join(errs, "; ")) }

// sections are our sections of dendrite.yaml. They are pointers because of sections without keys: the YAML library would clear a struct,
// but leaves the target of a pointer as it is.
type sections struct {
	Expiration *Config    `yaml:"expiration"`
	MatrixRTC  *MatrixRTC `yaml:"matrix_rtc"`
}

func parse(data []byte) (*Config, error) {
	c := &Config{}
	c.Defaults()
	var errs config.ConfigErrors
	err := yaml.UnmarshalStrict(data, &sections{c, &c.MatrixRTC})
	if typeErr := (*yaml.TypeError)(nil); errors.As(err, &typeErr) {
		for _, text := range typeErr.Errors {
			if text = explain(text, strings.Split(string(data), "\n")); text != "" {
				errs.Add(text)
			}
		}
	} else if err != nil {
		return nil, err
	}
	if len(errs) == 0 { // after an error, a value of the file may be missing
		c.Verify(&errs)
	}
	if len(errs) > 0 {
		return nil, joined(errs)
	}
	return c, nil
}

// Duration is a duration that is written with its unit. The YAML library takes a number without one as nanoseconds.
type Duration time.Duration

func (d Duration) String() string { return time.Duration(d).String() }

// noDuration is a type that no YAML value fits into, so that the library's error has the line and the value.
type noDuration chan struct{}

// UnmarshalYAML implements yaml.Unmarshaler.
func (d *Duration) UnmarshalYAML(unmarshal func(any) error) error {
	var text string
	if unmarshal(&text) == nil {
		if parsed, err := time.ParseDuration(text); err == nil {
			*d = Duration(parsed)
			return nil
		}
	}
	return unmarshal(new(noDuration))
}
