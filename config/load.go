package config

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/setup/config"
	"gopkg.in/yaml.v2"
)

// Load reads the section expiration out of the file that Dendrite has read the rest from. It is complete and
// verified when there is no error; the error names every bad key.
func Load(file string, cfg *config.Dendrite) (*Config, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	c, err := parseConfig(data)
	if err != nil {
		return nil, err
	}
	return c, c.resolveDatabase(cfg)
}

func parseConfig(data []byte) (*Config, error) {
	var root yaml.MapSlice
	if err := yaml.Unmarshal(data, &root); err != nil {
		return nil, err
	}
	c := &Config{}
	c.Defaults()
	if err := parseSection(root, "expiration", c); err != nil {
		return nil, err
	}
	if err := parseSection(root, "matrix_rtc", &c.MatrixRTC); err != nil {
		return nil, err
	}
	var errs config.ConfigErrors
	c.Verify(&errs)
	if c.MatrixRTC.Verify(&errs); len(errs) > 0 {
		return nil, errors.New(strings.Join(errs, "; "))
	}
	return c, nil
}

// parseSection reads one section, if it is there.
func parseSection[T any](root yaml.MapSlice, name string, into *T) error {
	var keys yaml.MapSlice
	for _, section := range root {
		if section.Key != name || section.Value == nil {
			continue
		}
		var ok bool
		if keys, ok = section.Value.(yaml.MapSlice); !ok {
			return fmt.Errorf("config key %q must be %s", name, kind(reflect.TypeFor[T]()))
		}
	}
	var errs config.ConfigErrors
	if checkKeys(&errs, name, keys, reflect.TypeFor[T]()); len(errs) > 0 {
		return errors.New(strings.Join(errs, "; "))
	}
	section, err := yaml.Marshal(keys)
	if err != nil {
		return err
	}
	if err = yaml.UnmarshalStrict(section, into); err != nil {
		return fmt.Errorf("config key %q: %w", name, err)
	}
	return nil
}

// checkKeys adds an error for each key that the section does not have, and for each value of a wrong kind. The YAML
// library would name Go types instead of the keys' places.
func checkKeys(errs *config.ConfigErrors, prefix string, section yaml.MapSlice, t reflect.Type) {
	for _, item := range section {
		key := fmt.Sprintf("%s.%v", prefix, item.Key)
		field, ok := fieldByKey(t, fmt.Sprint(item.Key))
		inner, isSection := item.Value.(yaml.MapSlice)
		list, isList := item.Value.([]any)
		switch {
		case !ok:
			errs.Add(fmt.Sprintf("unknown config key %q", key))
		case isSection && field.Type.Kind() == reflect.Struct:
			checkKeys(errs, key, inner, field.Type)
		case isList && field.Type.Kind() == reflect.Slice:
			for i, element := range list {
				place := fmt.Sprintf("%s[%d]", key, i)
				if inner, isSection = element.(yaml.MapSlice); isSection {
					checkKeys(errs, place, inner, field.Type.Elem())
				} else {
					errs.Add(fmt.Sprintf("config key %q must be %s", place, kind(field.Type.Elem())))
				}
			}
		default:
			data, err := yaml.Marshal(item.Value)
			if err == nil {
				err = yaml.Unmarshal(data, reflect.New(field.Type).Interface())
			}
			if err != nil {
				errs.Add(fmt.Sprintf("invalid value for config key %q: %v (must be %s)", key, item.Value, kind(field.Type)))
			}
		}
	}
}

// kind says what the values of a type look like.
func kind(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[time.Duration]():
		return "a duration, such as 90s or 24h"
	case t.Kind() == reflect.Struct:
		return "a section with keys of its own"
	case t.Kind() == reflect.Slice:
		return "a list of sections"
	case t.Kind() == reflect.Bool:
		return "true or false"
	case t.Kind() == reflect.String:
		return "text"
	}
	return "a whole number"
}

func fieldByKey(t reflect.Type, key string) (reflect.StructField, bool) {
	for i := range t.NumField() {
		if field := t.Field(i); field.Tag.Get("yaml") == key {
			return field, true
		}
	}
	return reflect.StructField{}, false
}
